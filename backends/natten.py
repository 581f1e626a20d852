"""NATTEN's neighborhood attention, where it is installed and serves the case (Hassani et al. 2023, 2024, 2025).

Since 0.20 it has no bias: sites with a relative one go elsewhere. On CPUs it runs FlexAttention uncompiled, with scores
of all queries and keys in memory: for comparison, not for speed. Its backward needs a GPU and is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import LocalProblem
from ..operators.backend import Backend, Request
from ..operators.index_rule import CLAMP

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECONDS_PER_PAIR = {"cpu": 4e-8, "cuda": 4e-12}
"""Of a query and a key, whichever on CPUs, seen ones on GPUs (an estimate). Only ratios matter."""


def local_attention(problem: LocalProblem) -> tuple[Tensor, Tensor]:
    """A window for every query; see ``attnrewrite.operators.local_attention``."""
    import natten  # type: ignore[import-not-found, unused-ignore]  # optional

    attend: Any = (natten.na1d, natten.na2d, natten.na3d)[len(problem.grid) - 1]
    maps = (each.contiguous() for each in (problem.query, problem.key, problem.value))
    output, lse = attend(
        *maps,
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        dilation=problem.dilation,
        is_causal=problem.is_causal,
        scale=problem.scale,
        additional_keys=None if problem.additional_keys is None else problem.additional_keys.contiguous(),
        additional_values=None if problem.additional_values is None else problem.additional_values.contiguous(),
        return_lse=True,
    )
    return output, lse


def supports(request: Request) -> str | None:
    """None, or what NATTEN does not have."""
    problem: Any = request.problem
    if request.dtype not in DTYPES:
        return f"it computes float32, float16 and bfloat16, not {request.dtype}"
    if problem.boundary != CLAMP or any(problem.offset):
        return "its windows slide inward at borders, around their queries"
    if any(each is not None for each in (problem.bias, problem.additional_bias, problem.place_bias, problem.post)):
        return "it has no bias (since 0.20), and adds nothing to weights"
    if min(problem.kernel_size) < 2:
        return "its windows have two places an axis at least"
    if 0 in problem.query.shape or (problem.additional == 0 and problem.additional_keys is not None):
        return "it takes no empty operands"
    return _refused_heads(request)


def _refused_heads(request: Request) -> str | None:
    problem: Any = request.problem
    _, _, head_dim, value_dim = problem.sizes
    if request.device != "cpu":
        return "its heads have a multiple of 8 channels" if head_dim % 8 or value_dim % 8 else None
    if head_dim != value_dim or head_dim not in (8, 16, 32, 64, 128, 256, 512):
        return "on CPUs its heads have as many channels for values as for keys, a power of two from 8 to 512"
    if len(problem.grid) == 1 and problem.is_causal[0] and problem.kernel_size == problem.grid:
        return "on CPUs it has no causal window over a whole sequence"
    return None


def cost(request: Request) -> float:
    """Modelled seconds."""
    problem: Any = request.problem
    batch, heads, *_ = problem.sizes
    tokens = torch.Size(problem.grid).numel()
    pairs = batch * heads * tokens * (tokens + problem.additional) if request.device == "cpu" else problem.pairs()
    return pairs * SECONDS_PER_PAIR[request.device]


NATTEN = Backend(
    name="natten",
    implementations={"local_attention": local_attention},
    cost=cost,
    supports=supports,
    requires=("natten",),
    devices=("cpu", "cuda"),
)
