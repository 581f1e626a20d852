"""What is exact on one map need not be on another: a kernel may cover the first and leave keys of the second out."""

from __future__ import annotations

from torch import nn

from ..errors import ConversionError
from ..ir.core import AttentionCore
from ..ir.sites import Grid


class ExactWhereHeld(AttentionCore):
    """Base of cores that keep the function of what they replace on some maps only.

    ``exact``: the user asked for nothing less, so that other maps are refused.
    """

    exact = False

    def hold(self, keeps_function: bool, grid: Grid) -> None:
        """
        Raises:
            ConversionError: the function would not be kept on a map on which it has to be.
        """
        if self.exact and not keeps_function:
            raise ConversionError(
                f"on a {grid} map {type(self).__name__} leaves out keys that the original attends to, but an "
                "exact conversion was requested; convert with fidelity='projected', or with example inputs of this size"
            )


def hold_exact(core: nn.Module) -> None:
    """From now on ``core`` refuses maps on which it would not keep the function."""
    for part in core.modules():
        if isinstance(part, ExactWhereHeld):
            part.exact = True
