"""The pointwise part of an MLP."""

from __future__ import annotations

from torch import Tensor

from ..ir.core import StageCore
from ..numerics.activations import ACTIVATIONS


class Activation(StageCore):
    """``activation(hidden)``, or ``activation(hidden) * gate`` (Shazeer 2020, GLU variants)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        """``[..., channels]`` in, the same out."""
        activated = ACTIVATIONS[self.name](hidden)
        return activated if gate is None else activated * gate

    def extra_repr(self) -> str:
        return self.name
