"""Weighted second moments of features and errors, in float64: all that least squares needs to know of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parallel import summed


class Moments:
    """Of rows ``x`` ``[rows, features]`` and ``e`` ``[rows, outputs]``: ``gram = x^T x``, ``cross = x^T e``, ``|e|^2``.

    Nothing is stored a row, so memory does not grow with the data.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(features, features, **options)
        self.cross = torch.zeros(features, outputs, **options)
        self.square = torch.zeros((), **options)

    def add(self, x: Tensor, e: Tensor, weights: Tensor) -> None:
        """Take in rows of float64, weighted by ``weights`` ``[rows]``."""
        weighted = x * weights[:, None]
        self.gram += weighted.T @ x
        self.cross += weighted.T @ e
        self.square += (e.square().sum(1) * weights).sum()

    def reduce(self) -> None:
        summed(self.gram, self.cross, self.square)

    def error(self, change: Tensor | None = None) -> float:
        """``|e - x change|^2``."""
        if change is None:
            return float(self.square)
        removed = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return float((self.square - removed).clamp(min=0))

    def transformed(self, basis: Tensor) -> Moments:
        """Moments of ``x @ basis`` and the same errors."""
        other = Moments(basis.shape[1], self.cross.shape[1], self.gram.device)
        other.gram, other.cross, other.square = basis.T @ self.gram @ basis, basis.T @ self.cross, self.square
        return other
