"""Where every token sits on the map: cell numbers, carried forward from the convolutions that made the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.contraction import contraction
from ..graph.dataflow import Dataflow
from ..graph.movement import move, moved_operands
from ..graph.values import operator_name, shape_of
from ..ir.sites import Grid

_REGRIDDING = {
    f"aten::{name}"
    for name in [
        "conv2d",
        "convolution",
        "avg_pool2d",
        "max_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_nearest2d",
    ]
}


@dataclass(frozen=True)
class _Cells:
    """One more than the cell of every element (0: none, as padding gives) on a map of ``size``.

    Operators with several results have one tensor for each.
    """

    number: Any
    size: tuple[int, int]

    @cached_property
    def of_tokens(self) -> Tensor | None:
        """``[..., 1]`` where all channels of a token have one number, else None."""
        number: Tensor = self.number
        expanded = number.stride(-1) == 0  # from one number a token, by an earlier linear map
        return number[..., :1] if expanded or bool((number == number[..., :1]).all()) else None


def token_grids(flow: Dataflow, wanted: Iterable[Node]) -> dict[Node, Grid]:
    """The grid of each wanted ``[batch, tokens, channels]`` value whose tokens lie in raster order after a prefix."""
    wanted = set(wanted)
    cells = _numbered(flow, wanted)
    return {node: grid for node in wanted if node in cells and (grid := _raster(cells[node])) is not None}


def token_cells(flow: Dataflow, node: Node) -> tuple[Grid, Tensor] | None:
    """The map that a value's tokens lie on and the cell of every token of one sample (-1: none); None if not known."""
    cells = _numbered(flow, {node}).get(node)
    return None if cells is None else (Grid(*cells.size), _of_sample(cells))


def _numbered(flow: Dataflow, wanted: set[Node]) -> dict[Node, _Cells]:
    """Cell numbers of everything that has them, up to the last wanted value."""
    last = max(wanted, default=None)
    cells: dict[Node, _Cells] = {}
    for node in flow.capture.graph.nodes if wanted else ():
        if node.op == "call_function" and node not in flow.constants:
            found = _cells(node, cells, flow)
            if found is not None:
                cells[node] = found
        if node is last:
            break
    return cells


def _cells(node: Node, cells: dict[Node, _Cells], flow: Dataflow) -> _Cells | None:
    if operator_name(node) in _REGRIDDING:
        height, width = shape_of(node)[-2:]
        number = torch.arange(1, height * width + 1, dtype=torch.float32).view(height, width)
        return _Cells(number.expand(shape_of(node)), (height, width))
    if flow.is_movement(node):
        return _moved(node, cells, flow) or (_own(node) if node in flow.channel_maps.moved.values() else None)
    known = [used for used in node.all_input_nodes if used in cells]
    if not known:
        return None
    if flow.is_linear(node):
        return _projected(node, cells[known[0]])
    if contraction(node) is not None or not isinstance(node.meta["val"], Tensor):
        return None
    alike = [used for used in known if shape_of(used) == shape_of(node)]
    return cells[alike[0]] if alike else None


def _own(node: Node) -> _Cells | None:
    """The map ``[batch, height, width, channels]`` of a convolution, where nothing is known of what made it."""
    _, *sides, _ = shape_of(node)
    if len(sides) != 2 or 1 in sides:
        return None
    number = torch.arange(1, sides[0] * sides[1] + 1, dtype=torch.float32).view(*sides, 1)
    return _Cells(number.expand(shape_of(node)), (sides[0], sides[1]))


def _moved(node: Node, cells: dict[Node, _Cells], flow: Dataflow) -> _Cells | None:
    moved = moved_operands(node)
    size = next((cells[used].size for used in moved if used in cells), None)
    if size is None:
        return None
    none = {used: torch.zeros(shape_of(used), dtype=torch.float32) for used in moved if used not in cells}
    values = none | {used: cells[used].number for used in moved if used in cells}
    return _Cells(move(node, values, flow.constants), size)


def _projected(node: Node, inputs: _Cells) -> _Cells | None:
    """A linear map keeps tokens; where one token gathers several cells it makes a coarser map of them."""
    number, of_tokens = inputs.number, inputs.of_tokens
    if of_tokens is not None:
        return _Cells(of_tokens.expand(shape_of(node)), inputs.size)
    if bool((number == 0).any()):
        return None
    rows = ((number - 1) // inputs.size[1]).mean(-1)
    columns = ((number - 1) % inputs.size[1]).mean(-1)
    rows, row = torch.unique(rows, return_inverse=True)
    columns, column = torch.unique(columns, return_inverse=True)
    size = (len(rows), len(columns))
    return _Cells((row * size[1] + column + 1.0)[..., None].expand(shape_of(node)), size)


def _raster(cells: _Cells) -> Grid | None:
    if cells.number.ndim < 3:
        return None
    number = _of_sample(cells)
    prefix = int((number >= 0).int().argmax())
    height, width = cells.size
    if not torch.equal(number[prefix:], torch.arange(height * width)):
        return None
    return Grid(height, width, prefix)


def _of_sample(cells: _Cells) -> Tensor:
    number: Tensor = cells.number[0, ..., 0].flatten().long() - 1
    return number
