"""How far a value is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value; NaN if either has one."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def worst(*errors: float) -> float:
    """The largest; a NaN is the worst."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
