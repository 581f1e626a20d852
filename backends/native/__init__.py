"""Kernels in C++ for CPUs: compiled in a wheel or on the spot (``python -m attnrewrite build``), and optional.

Half precision is computed in float32. Results do not depend on the number of threads. What a query does not see does
not reach it, NaN and infinity included.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ...operators import ConvGluProblem, LocalProblem
from ...operators.backend import Backend, Deferred, Request
from ...operators.index_rule import MASK
from .. import plain
from . import library

WIDEST_WINDOW = 13
LANES = 16
SECONDS_PER_PAIR, SECONDS_PER_PRODUCT = 5e-10, 2.8e-11
"""Rounded fits to measured runs, by the side of ``tiled``'s; only ratios matter."""

ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "silu", "relu")
SMALL_MAP = 14 * 14


def supports(request: Request) -> str | None:
    """None, or what the kernels are not written for; at last, why they are not there."""
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {request.dtype}"
    problem = request.problem
    reason = _refused_window(problem) if isinstance(problem, LocalProblem) else None
    if isinstance(problem, ConvGluProblem):
        reason = _refused_gate(problem)
    return reason or library.missing()


def _refused_window(problem: LocalProblem) -> str | None:
    if any(size % 2 == 0 or size > WIDEST_WINDOW for size in problem.kernel_size):
        return f"its windows are of an odd size up to {WIDEST_WINDOW}"
    if set(problem.stride) != {1} or any(problem.is_causal):
        return "every query has a window of its own, around it: no stride, and none that is causal"
    if problem.boundary == MASK and any(problem.offset):
        return "its windows are around their queries"
    return None


def _refused_gate(problem: ConvGluProblem) -> str | None:
    if problem.weight.shape[-1] not in (3, 5):
        return "its filters are 3 x 3 or 5 x 5"
    unknown = {problem.activation, problem.pre_activation} - set(ACTIVATIONS)
    return f"it has no activation {min(unknown)!r}" if unknown else None


def cost(request: Request) -> float:
    """Modelled seconds: vectors run along rows, and their last one is seldom full."""
    problem: Any = request.problem
    if isinstance(problem, ConvGluProblem):  # torch's convolution is slow on small maps and in the backward of 5 x 5
        is_slow = problem.weight.shape[-1] == 5 and (request.backward or request.needs_gradient)
        return plain.cost(request) * (0.5 if is_slow or prod(problem.gate.shape[1:3]) <= SMALL_MAP else 1.5)
    batch, heads, head_dim, value_dim = problem.sizes
    width = max(1, -(-problem.grid[-1] // problem.dilation[-1]))
    pairs = batch * heads * prod(problem.grid) * (problem.places + problem.additional)
    waste = -(-width // LANES) * LANES / width
    return pairs * waste * (SECONDS_PER_PAIR + (head_dim + value_dim) * SECONDS_PER_PRODUCT)


NATIVE = Backend(
    name="native",
    implementations=Deferred(f"{__name__}.local", "local_attention", "local_attention_backward")
    | Deferred(f"{__name__}.gate", "conv_glu", "conv_glu_backward"),
    cost=cost,
    supports=supports,
    devices=("cpu",),
)
