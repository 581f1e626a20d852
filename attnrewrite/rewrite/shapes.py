"""Free an outlined graph of the sizes it was captured at.

Sizes in ``view``, ``reshape`` and ``expand`` are restated as products of the runtime extents of earlier values: the
factors of the operand's axes are matched with the wanted sizes in row-major order. What cannot be restated ties the
graph to the captured size, and is reported.
"""

from __future__ import annotations

import itertools
import operator
import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..layout import from_heads_last, heads_last
from ..letters import position_and_dim
from ..lift.movement import permutation
from ..lift.values import argument, input_of, is_call, operator_name

CHANNELS_FIRST = "attnrewrite_channels_first"
"""Marks, in their ``meta``, calls of convolutions of kernel 1."""

TOKENS_OF_MAP = "attnrewrite_tokens_of_map"
"""Marks calls that make raster-ordered tokens of a map with its channels first."""

_VIEWS = {"aten::view", "aten::reshape", "aten::_unsafe_view"}
_EXPANDS = {"aten::expand"}
_PARTING = {"aten::unbind": (1, "dim"), "aten::chunk": (2, "dim"), "aten::split": (2, "dim")}
"""Where operators with several results are told the axis."""
_SIZED = {
    f"aten::{name}"
    for name in [
        "repeat",
        "arange",
        "zeros",
        "ones",
        "full",
        "empty",
        "linspace",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_nearest2d",
        "repeat_interleave",
        "index",
        "gather",
        "split_with_sizes",
    ]
}


@dataclass(frozen=True)
class Factor:
    """A part of an axis: a fixed ``size``, or an extent of ``node`` (``axis`` None: its value) over ``divisor``.

    ``tokens``: it counts the tokens of a map of unknown sides, so that parts of it hold for the captured map only.
    """

    size: int
    node: Node | None = None
    axis: int | None = None
    divisor: int = 1
    tokens: bool = False


Axis = tuple[Factor, ...]


def free_sizes(graph: fx.Graph, leaves: list[Node]) -> list[str]:
    """Restate sizes in place; returns the names of operators that stay tied to the captured size."""
    return _Freeing(graph, leaves).run()


class _Freeing:
    def __init__(self, graph: fx.Graph, leaves: list[Node]) -> None:
        self.graph = graph
        self.axes: dict[Node, tuple[Axis, ...]] = {}
        self.sizes = [leaf for leaf in leaves if type(leaf.meta.get("value")) is int]
        self.tied: list[str] = []
        self.first = next((leaf for leaf in leaves if isinstance(leaf.meta.get("val"), Tensor)), None)

    def run(self) -> list[str]:
        live: set[Node] = set()
        for node in list(self.graph.nodes):
            name = operator_name(node)
            if node.op == "placeholder" or any(used in live for used in node.all_input_nodes):
                live.add(node)
            if node not in live and name in _EXPANDS | {"aten::repeat"} and self._per_sample(node):
                live.add(node)  # what is made of it has the samples' extent too
                continue
            if node.op == "output" and any(type(leaf) is int for leaf in tree_leaves(node.args)):
                self._share_sizes(node)
                if any(type(leaf) is int for leaf in tree_leaves(node.args)):
                    self.tied.append("a number it returns")
            if node not in live:  # made of parameters alone: its sizes are the model's, not the image's
                value = node.meta.get("val")
                self.axes[node] = tuple((Factor(n),) for n in value.shape) if isinstance(value, Tensor) else ()
                continue
            if node.op == "call_module":
                self._share_sizes(node)
            elif name in _VIEWS:
                self._view(node)
                continue
            elif name == "aten::unflatten":
                self._unflatten(node)
                continue
            elif name in _EXPANDS:
                self._expand(node)
            elif is_call(node) and self._is_tied(node, name):
                self.tied.append(name)
            self.axes[node] = self._axes(node)
        return self.tied

    def _view(self, node: Node) -> None:
        source: Node = input_of(node)
        wanted = _split(_flat(self.axes[source]), _shape(node), self.sizes)
        if wanted is None:
            self.tied.append(operator_name(node))
            self.axes[node] = self._own_axes(node)
            return
        self.axes[node] = wanted
        if any(factor.tokens and factor.divisor > 1 for factor in _flat(wanted)):
            self.tied.append(operator_name(node))
        with self.graph.inserting_before(node):
            node.args = (source, [self._extent(axis) for axis in wanted])

    def _unflatten(self, node: Node) -> None:
        """As a view of one axis; samples are not told from heads by numbers."""
        source, along, sizes = (argument(node, position) for position in range(3))
        axes, along = self.axes[source], along % len(self.axes[source])
        parts = _split(_flat((axes[along],)), _shape(node)[along : along + len(sizes)], self.sizes)
        if parts is None or along == 0 or -1 in sizes or any(factor.tokens for factor in axes[along]):
            self.tied.append(operator_name(node))
            self.axes[node] = self._own_axes(node)
            return
        self.axes[node] = (*axes[:along], *parts, *axes[along + 1 :])
        if along < len(axes) - 1:  # else channels split into heads are the model's numbers, not the image's
            with self.graph.inserting_before(node):
                node.args = (source, along, [self._extent(axis) for axis in parts])

    def _expand(self, node: Node) -> None:
        source: Node = input_of(node)
        given = (1,) * (len(_shape(node)) - len(_shape(source))) + _shape(source)
        sizes: list[Any] = []
        with self.graph.inserting_before(node):
            for axis, (before, after) in enumerate(zip(given, _shape(node), strict=True)):
                if before == after and axis >= len(given) - len(_shape(source)):
                    sizes.append(-1)
                elif axis == 0 and self.first is not None and after == _shape(self.first)[0]:
                    sizes.append(self._samples())
                else:
                    sizes.append(after)
        node.args = (source, sizes)

    def _per_sample(self, node: Node) -> bool:
        """A parameter spread over the samples, as a class token is: its first axis follows the batch. Whether it is."""
        counts = list(argument(node, 1))
        grown = {axis for axis, count in enumerate(counts) if count not in (-1, 1)}
        if self.first is None or not grown <= {0} or _shape(node)[0] != _shape(self.first)[0]:
            return False
        with self.graph.inserting_before(node):
            node.args = (node.args[0], [self._samples(), *counts[1:]])
        samples = Factor(_shape(node)[0], self.first, 0)
        self.axes[node] = ((samples,), *((Factor(size),) for size in _shape(node)[1:]))
        return True

    def _samples(self) -> Any:
        assert self.first is not None
        return self._extent((Factor(_shape(self.first)[0], self.first, 0),))

    def _axes(self, node: Node) -> tuple[Axis, ...]:
        name, operands = operator_name(node), [used for used in node.all_input_nodes if used in self.axes]
        if name in _PARTING:
            return self.axes[input_of(node)]
        if not isinstance(node.meta.get("val"), Tensor):
            return ()
        order = permutation(node)
        if order is not None:
            return tuple(self.axes[input_of(node)][axis] for axis in order)
        if name == "getitem" and operator_name(operands[0]) in _PARTING:
            return self._part(node, operands[0])
        if node.meta.get(CHANNELS_FIRST):
            return self._convolved(node)
        if node.meta.get(TOKENS_OF_MAP):
            samples, _, *sides = self.axes[input_of(node)]
            return samples, tuple(_flat(tuple(sides))), self._own_axes(node)[-1]
        if name == "aten::select":
            return self._without(self.axes[input_of(node)], argument(node, 1))
        if name == "aten::flatten":
            return self._flattened(node)
        if name in ("aten::bmm", "aten::matmul") and len(_shape(input_of(node))) == len(_shape(node)):
            return (*self.axes[input_of(node)][:-1], self._own_axes(node)[-1])
        if node.target is from_heads_last:
            return self._of_core(node)
        if name == "getitem":  # one of several results of a child
            operands += [used for child in operands if child.op == "call_module" for used in child.all_input_nodes]
        for used in operands:
            if self.axes[used] and _shape(used) == _shape(node) and (is_call(node) or node.op == "call_module"):
                return self.axes[used]
        return self._with_channels_first(self._own_axes(node), operands)

    def _with_channels_first(self, own: tuple[Axis, ...], operands: list[Node]) -> tuple[Axis, ...]:
        """The middle axis of three is channels, not tokens, where an operand has as many channels there (pooling)."""
        for axes in (self.axes[used] for used in operands):
            if len(own) == len(axes) == 3 and len(axes[1]) == 1 and axes[1][0].size == own[1][0].size:
                given, axis = axes[1][0].node, axes[1][0].axis
                if given is not None and axis == 2 and len(_shape(given)) == 3:
                    return own[0], axes[1], own[2]
        return own

    def _convolved(self, node: Node) -> tuple[Axis, ...]:
        """A convolution of kernel 1 keeps the places of the map that it is given."""
        places = self.axes[node.all_input_nodes[0]][2:]
        if len(places) == 1 and len(places[0]) == 1:
            places = ((replace(places[0][0], tokens=True),),)
        return (*self._own_axes(node)[:2], *places)

    def _part(self, node: Node, parted: Node) -> tuple[Axis, ...]:
        """One of several results: all axes but the one that was parted are as before."""
        axes, along = list(self.axes[parted]), argument(parted, *_PARTING[operator_name(parted)], 0)
        if operator_name(parted) == "aten::unbind":
            return self._without(self.axes[parted], along)
        axes[along] = self._own_axes(node)[along]
        return tuple(axes)

    @staticmethod
    def _without(axes: tuple[Axis, ...], along: int) -> tuple[Axis, ...]:
        return tuple(axis for place, axis in enumerate(axes) if place != along % len(axes))

    def _flattened(self, node: Node) -> tuple[Axis, ...]:
        axes = self.axes[input_of(node)]
        start, end = (argument(node, i, default=whole) % len(axes) for i, whole in ((1, 0), (2, -1)))
        merged = tuple(factor for axis in axes[start : end + 1] for factor in axis)
        return (*axes[:start], merged, *axes[end + 1 :])

    def _of_core(self, node: Node) -> tuple[Axis, ...]:
        """What an attention core hands back has the groups and positions of its queries; a single factor says nothing
        of the sides of their map."""
        step = node
        while step.target is not heads_last:
            step = input_of(step)
        letters: str = argument(step, 1)
        known = dict(zip(letters, self.axes[input_of(step)], strict=True))
        position, _ = position_and_dim(letters)
        if len(known[position]) == 1:
            known[position] = (replace(known[position][0], tokens=True),)
        own = zip(argument(node, 1), self._own_axes(node), strict=True)
        return tuple(known.get(letter, axis) for letter, axis in own)

    def _own_axes(self, node: Node) -> tuple[Axis, ...]:
        return tuple((Factor(size, node, axis),) for axis, size in enumerate(_shape(node)))

    def _extent(self, axis: Axis) -> Any:
        """A graph value, or a number, for the runtime extent of an axis."""
        extent: Any = 1
        for factor in axis:
            part: Any = factor.size
            if factor.node is not None:
                part = self._runtime(factor)
            extent = part if extent == 1 and not isinstance(extent, Node) else self._times(extent, part)
        return extent

    def _runtime(self, factor: Factor) -> Node:
        assert factor.node is not None
        part = factor.node
        if factor.axis is not None:
            part = self.graph.call_method("size", (part, factor.axis))
        return part if factor.divisor == 1 else self.graph.call_function(operator.floordiv, (part, factor.divisor))

    def _times(self, left: Any, right: Any) -> Any:
        if not isinstance(left, Node) and not isinstance(right, Node):
            return left * right
        return (
            left
            if right == 1 and not isinstance(right, Node)
            else self.graph.call_function(operator.mul, (left, right))
        )

    def _share_sizes(self, node: Node) -> None:
        """Two numbers in a row that are the sides of a map become this call's own: arguments, or a map's extents.

        Children are given them, and some modules return them.
        """
        numbers = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if type(leaf) is int]
        known = self._known_sides()
        pairs = [pair for pair in itertools.pairwise(numbers) if pair in known]
        if not pairs:
            return
        with self.graph.inserting_before(node):
            sides = [self._extent((factor,)) for factor in known[pairs[0]]]
        position = next(i for i, pair in enumerate(itertools.pairwise(numbers)) if pair == pairs[0])
        counter = itertools.count()

        def shared(leaf: Any) -> Any:
            if type(leaf) is not int:
                return leaf
            number = next(counter) - position
            return sides[number] if number in (0, 1) else leaf

        node.args, node.kwargs = _map_numbers(node.args, shared), _map_numbers(node.kwargs, shared)

    def _known_sides(self) -> dict[tuple[int, int], tuple[Factor, Factor]]:
        """Sides of the maps in the graph so far, the latest first choice, and above them the given ones."""
        known: dict[tuple[int, int], tuple[Factor, Factor]] = {}
        for node in self.axes:
            shape = _shape(node) if isinstance(node.meta.get("val"), Tensor) else ()
            if len(shape) == 4:
                first = 2 if node.op == "call_module" or "conv" in operator_name(node) else 1
                known[shape[first], shape[first + 1]] = (
                    Factor(shape[first], node, first),
                    Factor(shape[first + 1], node, first + 1),
                )
        if len(self.sizes) >= 2:
            given = self.sizes[:2]
            height, width = (leaf.meta["value"] for leaf in given)
            known[height, width] = (Factor(height, given[0]), Factor(width, given[1]))
        return known

    def _is_tied(self, node: Node, name: str) -> bool:
        if name == "aten::pad":
            return any(amount != 0 for amount in argument(node, 1))
        if name == "aten::slice":
            source = input_of(node)
            given: list[Any] = [*node.args[1:4], *(0, 0, None)[len(node.args) - 1 :]]
            axis, start, stop = given
            if start in (0, None) and stop is not None and stop >= _shape(source)[axis]:
                node.args = (source, axis, 0, sys.maxsize, *node.args[4:])
                return False
            return isinstance(stop, int) and 0 < stop < 2**31 and not self._is_prefix(start, stop)
        return name in _SIZED

    @staticmethod
    def _is_prefix(start: Any, stop: int) -> bool:
        """A few leading tokens: the class token and its like, whose number does not change with the image."""
        return stop <= 16


def _map_numbers(arguments: Any, change: Any) -> Any:
    if isinstance(arguments, tuple | list):
        return type(arguments)(_map_numbers(value, change) for value in arguments)
    if isinstance(arguments, dict):
        return {name: _map_numbers(value, change) for name, value in arguments.items()}
    return change(arguments)


def _split(factors: list[Factor], sizes: tuple[int, ...], given: list[Node]) -> tuple[Axis, ...] | None:
    """Distribute row-major ``factors`` over ``sizes``, cutting a factor where a boundary falls into it.

    Channels are cut into heads by number. A token axis is only cut into the sides that the module was ``given`` as
    arguments: otherwise nothing says which side would grow with the image. A factor of extent 1 (a batch of one)
    between two axes goes to the later one, unless that is the last: channels are not merged with samples.
    """
    pending = list(reversed(factors))
    axes: list[Axis] = []
    for number, size in enumerate(sizes):
        axis: list[Factor] = []
        extent = 1
        if size == 1 and pending and pending[-1].size == 1:
            axis.append(pending.pop())
        while extent < size:
            if not pending:
                return None
            factor, need = pending.pop(), size // extent
            if need % factor.size:
                parts = _cut(factor, need, sizes[number : number + 2], given)
                if parts is None:
                    return None
                factor, rest = parts
                pending.append(rest)
            axis.append(factor)
            extent *= factor.size
        while number == len(sizes) - 2 and size > 1 and pending and pending[-1].size == 1:
            axis.append(pending.pop())
        axes.append(tuple(axis))
    if any(factor.size != 1 for factor in pending):
        return None
    if pending and axes:
        axes[-1] = (*axes[-1], *reversed(pending))
    return tuple(axes)


def _cut(factor: Factor, need: int, ahead: tuple[int, ...], given: list[Node]) -> tuple[Factor, Factor] | None:
    """``factor`` as an outer part of extent ``need`` and the rest."""
    sides = tuple(leaf.meta["value"] for leaf in given[:2])
    if len(sides) == 2 and ahead == sides and factor.size == sides[0] * sides[1]:
        return Factor(sides[0], given[0]), Factor(sides[1], given[1])
    if factor.size % need or _counts_tokens(factor):
        return None
    inner = factor.size // need
    return replace(factor, size=need, divisor=factor.divisor * inner), Factor(inner)


def _counts_tokens(factor: Factor) -> bool:
    """The middle axis of ``[batch, tokens, channels]``; any other is channels or one side of a map."""
    channels_first = factor.node is not None and factor.node.meta.get(CHANNELS_FIRST)
    middle = factor.node is not None and factor.axis == 1 and len(_shape(factor.node)) == 3
    return middle and not channels_first and not factor.tokens  # what is known to count them is cut, and tied


def _flat(axes: tuple[Axis, ...]) -> list[Factor]:
    return [factor for axis in axes for factor in axis]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
