"""Kernels in C++ for CPUs: compiled in a wheel or on the spot (``python -m attnrewrite build``), and optional.

Half precision is computed in float32. Results do not depend on the number of threads. What a query does not see does
not reach it, NaN and infinity included.
"""

from __future__ import annotations

from math import prod

import torch

from ...operators import LocalProblem
from ...operators.backend import Backend, Deferred, Request
from ...operators.index_rule import MASK
from . import library

WIDEST_WINDOW = 13
LANES = 16
SECONDS_PER_PAIR, SECONDS_PER_PRODUCT = 5e-10, 2.8e-11
"""Rounded fits to measured runs, by the side of ``tiled``'s; only ratios matter."""


def supports(request: Request) -> str | None:
    """None, or what the kernels are not written for; at last, why they are not there."""
    problem = request.problem
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {request.dtype}"
    if isinstance(problem, LocalProblem):
        if any(size % 2 == 0 or size > WIDEST_WINDOW for size in problem.kernel_size):
            return f"its windows are of an odd size up to {WIDEST_WINDOW}"
        if set(problem.stride) != {1} or any(problem.is_causal):
            return "every query has a window of its own, around it: no stride, and none that is causal"
        if problem.boundary == MASK and any(problem.offset):
            return "its windows are around their queries"
    return library.missing()


def cost(request: Request) -> float:
    """Modelled seconds: vectors run along rows, and their last one is seldom full."""
    problem = request.problem
    assert isinstance(problem, LocalProblem)
    batch, heads, head_dim, value_dim = problem.sizes
    width = max(1, -(-problem.grid[-1] // problem.dilation[-1]))
    pairs = batch * heads * prod(problem.grid) * (problem.places + problem.additional)
    waste = -(-width // LANES) * LANES / width
    return pairs * waste * (SECONDS_PER_PAIR + (head_dim + value_dim) * SECONDS_PER_PRODUCT)


NATIVE = Backend(
    name="native",
    implementations=Deferred(f"{__name__}.local", "local_attention", "local_attention_backward"),
    cost=cost,
    supports=supports,
    devices=("cpu",),
)
