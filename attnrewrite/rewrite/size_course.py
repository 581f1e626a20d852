"""The course that a forward takes through its comparisons of sizes, and the check that it is one that was seen."""

from __future__ import annotations

from typing import Any

from torch.fx.node import has_side_effect

from ..capture.sizes import Decision
from ..errors import ConversionError

CHECK = "attnrewrite_check"
"""Marks, in their ``meta``, nodes that are there for the error that they may raise."""

Course = list[tuple[Decision, tuple[tuple[Any, ...] | None, ...]]]
"""Decisions taken one after the other, each with its operands on every look, None where that had left the course."""


@has_side_effect
def expect_course(ways: list[list[tuple[Any, bool]]], what: str) -> None:
    """Comparisons of sizes must turn out in one of the ``ways`` that were seen, each of comparisons and their outcomes:
    the rewritten forward has one course only.

    Raises:
        ConversionError: they do not.
    """
    if not any(all(bool(holds) is outcome for holds, outcome in way) for way in ways):
        raise ConversionError(
            f"{what} differs at this size from when this module was converted, so the original would take "
            "another branch; convert the model with example inputs of this size"
        )
