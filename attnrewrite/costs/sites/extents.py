"""The side of every map as an expression in the image's sides, read from the operations that make maps coarser."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from sympy import Expr, Integer
from torch import Tensor
from torch.fx import Node

from ...algebra.symbols import H, W, down, strided, up
from ...capture import CapturedGraph
from ...graph.values import input_of, operator_name, shape_of
from ...ir.sites import StemSite

Sides = tuple[Expr, Expr]


@dataclass(frozen=True)
class Map:
    """A map of ``size`` cells at capture, which are ``sides`` at any size; made by ``node``.

    A pooled map of fixed size is ``fixed``; keys may come from it, but the model does not go on with it.
    """

    node: Node
    size: tuple[int, int]
    sides: Sides
    fixed: bool = False


class Maps:
    """All maps of a captured graph, in the order they are made.

    Args:
        merges: patch mergings that are no convolutions.
        odd_up: whether a merging pads an odd side (else it drops the last row).
    """

    def __init__(self, capture: CapturedGraph, merges: list[StemSite], odd_up: bool = True) -> None:
        self._maps: list[Map] = []
        self._round = up if odd_up else down
        self._merges = {site.result: site for site in merges}
        self.rounds_merges = bool(merges)
        for node in capture.graph.nodes:
            self._note(node, capture)

    def add(self, made: Map) -> None:
        """A map that a module is known to make, however it does."""
        self._maps = sorted([*self._maps, made], key=lambda known: known.node)

    def sides(self, size: tuple[int, int], before: Node, fixed: bool = False) -> Sides | None:
        """Of the latest map of that size made before a node; ``fixed`` allows pooled ones."""
        found = self._latest(before, lambda made: made.size == size and (fixed or not made.fixed))
        return None if found is None else found.sides

    def tokens(self, count: int, before: Node, prefixes: tuple[int, ...] = (0,)) -> Expr | None:
        """A number of tokens at capture, at any size: a map's cells after one of some numbers of prefix tokens."""
        if count == 1:
            return Integer(1)
        for fixed in (False, True):
            for prefix in sorted(set(prefixes) | {0}):
                found = self.of_cells(count - prefix, before, fixed)
                if found is not None:
                    return found[0] * found[1] + prefix
        return None

    def of_cells(self, count: int, before: Node, fixed: bool = False) -> Sides | None:
        """The sides of the latest map of so many cells."""
        found = self._latest(before, lambda made: made.size[0] * made.size[1] == count and made.fixed == fixed)
        return None if found is None else found.sides

    def _latest(self, before: Node, fits: Any) -> Map | None:
        return next((made for made in reversed(self._maps) if made.node < before and fits(made)), None)

    def _note(self, node: Node, capture: CapturedGraph) -> None:
        if node in capture.inputs:
            value = capture.tensors[node]
            if isinstance(value, Tensor) and value.ndim == 4:
                self._maps.append(Map(node, (value.shape[2], value.shape[3]), (H, W)))
        elif node in self._merges:
            self._note_merge(node, self._merges[node])
        elif operator_name(node) in _STRIDED:
            self._note_strided(node)
        elif operator_name(node) in _FIXED:
            height, width = shape_of(node)[-2:]
            self._maps.append(Map(node, (height, width), (Integer(height), Integer(width)), fixed=True))
        elif operator_name(node) == "aten::linear":
            self._note_coarser(node)

    def _note_coarser(self, node: Node) -> None:
        """A channels-last map of a size not seen yet was gathered from a finer one."""
        operand = node.args[0]
        assert isinstance(operand, Node)
        shape = shape_of(operand)
        if len(shape) != 4 or self.sides((shape[1], shape[2]), node) is not None:
            return
        for made in reversed(self._maps):
            ratio = round(made.size[0] / shape[1])
            if (
                not made.fixed
                and ratio > 1
                and all(-(-s // ratio) == c for s, c in zip(made.size, shape[1:3], strict=True))
            ):
                self.rounds_merges = True
                sides = tuple(self._round(side, Integer(ratio)) for side in made.sides)
                self._maps.append(Map(operand, (shape[1], shape[2]), (sides[0], sides[1])))
                return

    def _note_merge(self, node: Node, site: StemSite) -> None:
        shape = shape_of(site.source)
        count = math.prod(shape) // shape[0] // site.in_channels
        source = self._latest(node, lambda made: made.size[0] * made.size[1] == count and not made.fixed)
        if source is None:
            return
        size = tuple(-(-side // stride) for side, stride in zip(source.size, site.stride, strict=True))
        sides = tuple(self._round(side, Integer(s)) for side, s in zip(source.sides, site.stride, strict=True))
        self._maps.append(Map(node, (size[0], size[1]), (sides[0], sides[1])))

    def _note_strided(self, node: Node) -> None:
        operand = node.args[0]
        assert isinstance(operand, Node)
        read = _STRIDED[operator_name(node)](node)
        if read is None or len(shape_of(operand)) != 4:
            return
        padding = _padding_before(operand)
        source = operand if padding is None else padding.args[0]
        assert isinstance(source, Node)
        size = _sides_like(source, operand)
        before = self._behind(source, size)
        if before is None:
            return
        padded = before.sides if padding is None else self._padded(before, shape_of(operand)[-2:], read)
        sides = [strided(side, *axis) for side, axis in zip(padded, read, strict=True)]
        made = [strided(Integer(side), *axis) for side, axis in zip(shape_of(operand)[-2:], read, strict=True)]
        self._maps.append(Map(node, (int(made[0]), int(made[1])), (sides[0], sides[1]), before.fixed))

    def _padded(self, before: Map, seen: tuple[int, ...], read: Axes) -> tuple[Expr, ...]:
        """The sides, at any size, that a strided operation sees behind a padding of the map ``before``.

        One capture shows the padded sides (``seen``) and not the rule behind them. There are two in use: padding up to
        a multiple of the stride, or by a fixed amount. The first is taken wherever it explains what was seen.
        """
        strides = [stride for _, stride, _ in read]
        to_multiple = all(
            -(-old // stride) * stride == new for old, new, stride in zip(before.size, seen, strides, strict=True)
        )
        if not to_multiple:
            return tuple(side + new - old for side, old, new in zip(before.sides, before.size, seen, strict=True))
        self.rounds_merges = True  # whether odd sides are padded at all is decided by counts at other sizes
        return tuple(
            self._round(side, Integer(stride)) * stride for side, stride in zip(before.sides, strides, strict=True)
        )

    def _behind(self, operand: Node, size: tuple[int, int]) -> Map | None:
        """The nearest map of that size that a value is made from."""
        made = {known.node: known for known in self._maps if known.size == size}
        pending, seen = deque([operand]), {operand}
        while pending:
            node = pending.popleft()
            if node in made:
                return made[node]
            new = [used for used in node.all_input_nodes if used not in seen]
            seen.update(new)
            pending += new
        return None


def _padding_before(node: Node) -> Node | None:
    """The padding that a value is a rearrangement of, if it is one."""
    while operator_name(node) in _REARRANGING:
        node = input_of(node)
    return node if operator_name(node) == "aten::pad" else None


def _sides_like(source: Node, operand: Node) -> tuple[int, int]:
    """The map's sides of what is padded: channels first, as the operand, or last."""
    shape = shape_of(source)
    channels = shape_of(operand)[1]
    return (shape[1], shape[2]) if shape[-1] == channels and shape[1] != channels else (shape[-2], shape[-1])


Axes = tuple[tuple[int, int, int], tuple[int, int, int]]


def _convolution(node: Node) -> Axes | None:
    """Kernel (with its dilation), stride and padding of each axis."""
    kernel = shape_of(input_of(node, 1))[-2:]
    return _axes(kernel, *(_argument(node, position, name, default) for position, name, default in (
        (3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))))  # fmt: skip


def _pooling(node: Node) -> Axes | None:
    kernel = _argument(node, 1, "kernel_size", 1)
    return _axes(kernel, _argument(node, 2, "stride", None) or kernel, _argument(node, 3, "padding", 0), 1)


def _soft_split(node: Node) -> Axes | None:
    kernel, dilation, padding, stride = (node.args[1 + i] if len(node.args) > 1 + i else None for i in range(4))
    return _axes(kernel, stride or 1, padding or 0, dilation or 1)


def _axes(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Axes | None:
    if isinstance(padding, str):
        return None
    k, s, p, d = (_pair(value) for value in (kernel, stride, padding, dilation))
    first, second = (((k[i] - 1) * d[i] + 1, s[i], p[i]) for i in (0, 1))
    return first, second


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


_STRIDED = {
    "aten::conv2d": _convolution,
    "aten::convolution": _convolution,
    "aten::avg_pool2d": _pooling,
    "aten::max_pool2d": _pooling,
    "aten::im2col": _soft_split,
}
_REARRANGING = {"aten::permute", "aten::transpose", "aten::contiguous", "aten::clone"}
_FIXED = {"aten::adaptive_avg_pool2d", "aten::adaptive_max_pool2d"}
