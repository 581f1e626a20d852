"""Attention along the rows or columns of a map by ``scaled_dot_product_attention``, for inference on any device.

Install it (``pip install examples/custom_backend``) and it is found by its entry point; nothing imports it by name.
"""

import torch.nn.functional as F
from torch import Tensor

from attnrewrite.lowering import Backend, Request
from attnrewrite.numerics.precision import accumulation_dtype
from attnrewrite.operators import AxialProblem


def axial_attention(problem: AxialProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as ``attnrewrite.operators.axial_attention`` states them."""
    query, key, value = (problem.lines(part).transpose(1, 2) for part in (problem.query, problem.key, problem.value))
    output = F.scaled_dot_product_attention(query, key, value, scale=problem.scale).transpose(1, 2)
    wide = accumulation_dtype(query.dtype)
    lse = (problem.scale * query.to(wide) @ key.to(wide).mT).logsumexp(-1).transpose(1, 2)
    return problem.from_lines(output), problem.from_lines(lse)


def supports(request: Request) -> str | None:
    """The reason why not, or None."""
    problem = request.problem
    if isinstance(problem, AxialProblem) and problem.log_decay is not None:
        return "it has no decay"
    return None


def cost(request: Request) -> float:
    """Modeled seconds."""
    return 1e-11 * request.problem.macs()


SDPA_LINES = Backend("sdpa_lines", {"axial_attention": axial_attention}, cost, supports)
