"""The course that a forward takes through its comparisons of sizes, and checks that sizes are such as were seen."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from ..capture.sizes import Decision
from ..errors import ConversionError
from .size_forms import Vector

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


@has_side_effect
def expect_extents(what: str, shape: torch.Size, captured: tuple[int | None, ...]) -> None:
    """Extents that were the same on every look at the model must be so again (None: any).

    Raises:
        ConversionError: naming ``what`` has them.
    """
    if len(shape) != len(captured) or any(
        now != then for now, then in zip(shape, captured, strict=True) if then is not None
    ):
        wanted = ", ".join("any" if then is None else str(then) for then in captured)
        raise ConversionError(
            f"{what} has shape {list(shape)}, but this module could only be converted for [{wanted}]; convert the "
            "model again with example inputs of the new size"
        )


@has_side_effect
def expect_met(value: Tensor, captured: tuple[int | None, ...], operator: str) -> None:
    """The same of what an operator gives in the middle of a forward."""
    expect_extents(f"the result of {operator}", value.shape, captured)


def meets(extents: list[Vector], *sources: list[Vector]) -> bool:
    """Whether a value has more extents that stay, on all looks, than anything that it is made of, although each of
    these had more or less elements for one of its own on some look: as where a map is pooled by a part of its sides."""
    if not sources:
        return False
    staying, elements = _staying(extents), _elements(extents)
    return all(
        _staying(source) < staying and len(set(map(Fraction, elements, _elements(source)))) > 1 for source in sources
    )


def _staying(extents: list[Vector]) -> int:
    return sum(len(set(vector)) == 1 for vector in extents)


def _elements(extents: list[Vector]) -> list[int]:
    """How many there are on every look; never none, for they are compared as ratios."""
    return [max(1, int(math.prod(shape))) for shape in zip(*extents, strict=True)]
