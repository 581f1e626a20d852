"""A dense bias as a table by relative offset."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.index_rule import relative_entries, relative_offset

ROUNDING = 1e-6
"""Relative error of a bias that is one number: a vectorised sigmoid gives it other last digits at other places."""


def relative_table(values: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """A dense bias of one block as a table by relative offset, if that is what it is.

    Args:
        values: ``[heads, n, n]``, rows queries, columns keys, slots in raster order of ``size``.

    Returns:
        ``(table [heads, 2h-1, 2w-1], entry [(2h-1)(2w-1)])`` in key-minus-query order, where ``entry`` is a flat
        position in ``n*n`` from which the table's value can be taken; None if the bias is not relative.
    """
    offset, entry = relative_offset(size), relative_entries(size)
    table = values.flatten(1)[:, entry]
    if not torch.allclose(table[:, offset.flatten()], values.flatten(1), rtol=ROUNDING, atol=0.0):
        return None
    return table.unflatten(1, (2 * size[0] - 1, 2 * size[1] - 1)), entry
