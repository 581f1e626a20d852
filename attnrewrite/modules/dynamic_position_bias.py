"""Relative position bias of groups of tokens: computed by a network, held in a table, or both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


class DynamicPositionBias(nn.Module):
    """A network from offsets between tokens to a bias a head (DPB of CrossFormer, Wang et al. 2022, section 3.2).

    The paper's text and summaries of it make it ``dim / 4`` wide; the code, and so the published weights, ``dim / 16``.

    Args:
        width: of the hidden layers.
        num_heads: outputs.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, num_heads)
        )

    def forward(self, offsets: Tensor) -> Tensor:
        """``[M, 2]`` offsets in rows and columns, in steps of a group, to ``[M, num_heads]``."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))

    def table(self, rows: int, columns: int) -> Tensor:
        """``[(2 * rows - 1) * (2 * columns - 1), num_heads]``: of all offsets, as ``relative_index`` counts."""
        weight = self.pos_proj.weight
        steps = (
            torch.arange(1 - side, side, device=weight.device, dtype=weight.dtype).expand(count, -1)
            for side, count in ((rows, 2 * columns - 1), (columns, 2 * rows - 1))
        )
        by_column, by_row = steps
        return self(torch.stack([by_column.T, by_row], dim=-1).flatten(0, 1))


def relative_index(rows: int, columns: int, device: torch.device) -> Tensor:
    """``[n, n]`` for the n tokens of a group: the entry of a row-major table of offsets, query minus key (Swin's)."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    down, right = (place[:, None] - place[None, :] for place in (row, column))
    return (down + rows - 1) * (2 * columns - 1) + right + columns - 1


def central_table(table: Tensor, held: tuple[int, int], group: tuple[int, int]) -> Tensor:
    """The part of a table for groups of size ``held`` that smaller groups use.

    Args:
        table: ``[(2 * rows - 1) * (2 * columns - 1), num_heads]`` for ``held`` rows and columns.
        held, group: rows and columns.

    Raises:
        ArgumentError: the group is larger than the table reaches.
    """
    if held == group:
        return table
    if any(now > most for now, most in zip(group, held, strict=True)):
        raise ArgumentError(
            f"group_size: the position table is for groups of {held}, and this map needs {group}; interpolate the "
            "table, or use position_bias='dpb'"
        )
    cut = table.unflatten(0, (2 * held[0] - 1, 2 * held[1] - 1))
    for axis in (0, 1):
        cut = cut.narrow(axis, held[axis] - group[axis], 2 * group[axis] - 1)
    return cut.flatten(0, 1)
