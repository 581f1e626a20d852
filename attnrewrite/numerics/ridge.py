"""Ridge regression in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """``(gram + strength * mean(diag gram))^-1 cross``; zero where there are no features."""
    damping = strength * gram.diagonal().mean()
    if not damping > 0:
        return torch.zeros_like(cross)
    return torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)


def ridge_of_rows(features: Tensor, wanted: Tensor, strength: float) -> Tensor:
    """``ridge(x^T x, x^T y, strength)`` of rows ``x`` ``[rows, features]`` and ``y`` ``[rows, outputs]``, in float64;
    for fewer rows than features by way of ``x x^T``, which is smaller."""
    x, y = features.double(), wanted.double()
    rows, count = x.shape
    if rows >= count:
        return ridge(x.T @ x, x.T @ y, strength)
    return x.T @ ridge(x @ x.T, y, strength * rows / count)
