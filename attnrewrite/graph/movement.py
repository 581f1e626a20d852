"""Index propagation: what a chain of data movement does, read off by running it on addresses.

An element's address is its flat position in the source tensor it was copied from. Running ``view, permute, roll,
pad, index, ...`` on a tensor of addresses gives, for every element of the result, the element it came from; padding
is the address -1. No spelling is matched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .values import Values, argument, operator_name, run_node, shape_of

_REARRANGING = {
    f"aten::{name}"
    for name in [
        "view",
        "reshape",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "mT",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "adjoint",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "narrow",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "expand",
        "expand_as",
        "repeat",
        "tile",
        "repeat_interleave",
        "roll",
        "flip",
        "rot90",
        "cat",
        "concat",
        "stack",
        "index",
        "index_select",
        "gather",
        "take",
        "unfold",
        "im2col",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "diagonal",
        "broadcast_to",
    ]
}
_PERMUTING = {
    f"aten::{name}"
    for name in ["permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"]
}
_INDEXED = {"aten::index", "aten::index_select", "aten::gather", "aten::take"}
_COPYING = {
    f"aten::{name}"
    for name in [
        "contiguous",
        "clone",
        "alias",
        "detach",
        "lift_fresh_copy",
        "to",
        "_to_copy",
        "type_as",
        "dropout",
        "feature_dropout",
    ]
}
_PADDING = {"aten::pad", "aten::constant_pad_nd"}
_SCALING = {"aten::mul", "aten::div"}


@dataclass(frozen=True)
class Provenance:
    """Where the elements of ``node`` came from: ``offsets`` names the sources, ``path`` the movement since.

    ``factor`` is the number that every element was multiplied with on the way.
    """

    node: Node
    offsets: dict[Node, int]
    factor: float
    path: tuple[Node, ...] = field(repr=False)
    constants: Values = field(repr=False)

    @property
    def source(self) -> Node | None:
        """The only source, if there is only one."""
        return next(iter(self.offsets)) if len(self.offsets) == 1 else None

    @cached_property
    def spelling(self) -> str:
        """The path without the names of its nodes: where two are the same, so are the addresses."""
        number = {node: f"%{place}" for place, node in enumerate((*self.offsets, *self.path))}

        def named(used: Node) -> str:
            if used in number:
                return number[used]
            return f"constant {id(self.constants[used])}" if used in self.constants else f"like {shape_of(used)}"

        sources = [(tuple(shape_of(source)), offset) for source, offset in self.offsets.items()]
        steps = [(str(step.target), fx.node.map_arg((step.args, step.kwargs), named)) for step in self.path]
        return repr((sources, steps))

    @cached_property
    def address(self) -> Tensor:
        """Shaped as ``node``: for source ``s`` ``offsets[s]`` plus the flat position in ``s``; -1 is padding with zero.

        Made when it is asked for, since paths and sources often say enough.
        """
        counts = {source: source.meta["val"].numel() for source in self.offsets}
        # some movement operators refuse integers; these floating types are exact up to that many addresses
        dtype = torch.float32 if sum(counts.values()) < 2**24 else torch.float64
        values: dict[Node, Any] = {}
        for source, offset in self.offsets.items():
            # one more than the address, so that every kind of zero padding comes out as address -1
            first = offset + 1
            values[source] = torch.arange(first, first + counts[source], dtype=dtype).view(shape_of(source))
        for step in self.path:
            values[step] = move(step, values, self.constants)
        return values[self.node].long().sub_(1)


def provenance(
    node: Node, constants: Values, stop: Callable[[Node], bool] = lambda node: False, scaling: bool = False
) -> Provenance:
    """Trace ``node`` back through data movement to its sources, the nearest nodes that are not movement.

    ``constants`` gives the value of index tensors; ``stop`` ends the walk early at a node; with ``scaling``
    multiplication by a number is walked through as well.
    """
    path, sources, factor = _walk_back(node, constants, stop, scaling)
    ends = accumulate(source.meta["val"].numel() for source in sources)
    offsets = dict(zip(sources, (0, *ends), strict=False))  # the last end is no source's offset
    return Provenance(node, offsets, factor, tuple(path), constants)


def is_movement(node: Node, constants: Values) -> bool:
    """Every element of the result is an element of the operand, or zero padding."""
    name = operator_name(node)
    if node in constants:
        return False
    if name in _PADDING:
        return _pads_with_zero(node)
    if name in ("aten::dropout", "aten::feature_dropout"):
        return node.args[2] is False
    if any(used not in constants for used in index_operands(node)):
        return False
    if name == "getitem":
        return is_movement(moved_operands(node)[0], constants)
    return name in _REARRANGING or name in _COPYING


def is_copy(node: Node, constants: Values) -> bool:
    """The result equals the operand, element for element, in the operand's shape."""
    return operator_name(node) in _COPYING and is_movement(node, constants)


def moved_operands(node: Node) -> list[Node]:
    """The operands whose elements end up in the result (not the index tensors)."""
    first = argument(node, 0)
    return [first] if isinstance(first, Node) else [used for used in first if isinstance(used, Node)]


def index_operands(node: Node) -> list[Node]:
    """The operands that only say where elements go."""
    if operator_name(node) not in _INDEXED:
        return []
    return [used for used in node.all_input_nodes if used not in moved_operands(node)]


def permutation(node: Node) -> list[int] | None:
    """Which axis of the operand is which of the result's, if all that ``node`` does is to reorder axes."""
    if operator_name(node) not in _PERMUTING:
        return None
    operand = moved_operands(node)[0]
    sizes = range(len(shape_of(operand)))  # each its own number
    return list(run_node(node, {operand: torch.empty(*sizes, device="meta")}).shape)


def scale_of(node: Node) -> float | None:
    """The number that ``node`` multiplies its first operand with, if that is all it does."""
    if operator_name(node) not in _SCALING or len(node.args) < 2 or node.kwargs:
        return None
    operand, number = argument(node, 0), argument(node, 1)
    if not isinstance(operand, Node) or isinstance(number, Node):
        return None
    value = float(number)
    return value if operator_name(node) == "aten::mul" else 1.0 / value


def move(node: Node, values: Values, constants: Values) -> Any:
    """Run one movement on ``values``, whatever numbers they are; copies and scalings hand them on."""
    name = operator_name(node)
    if name in _COPYING or name in _SCALING:
        return values[moved_operands(node)[0]]
    if name in ("aten::view", "aten::_unsafe_view"):  # the copy that made a view possible is not made here
        return values[moved_operands(node)[0]].reshape(node.args[1])
    moved = moved_operands(node)
    others = (used for used in node.all_input_nodes if used not in moved)
    given = {used: constants.get(used, torch.empty(()).expand(shape_of(used))) for used in others}
    return run_node(node, given | {used: values[used] for used in moved})


def _walk_back(
    node: Node, constants: Values, stop: Callable[[Node], bool], scaling: bool
) -> tuple[list[Node], list[Node], float]:
    path: set[Node] = set()
    sources: dict[Node, None] = {}
    factor = 1.0
    pending = [node]
    while pending:
        step = pending.pop()
        if step in path or step in sources:
            continue
        scale = scale_of(step) if scaling else None
        if stop(step) or not (is_movement(step, constants) or scale is not None):
            sources[step] = None
            continue
        if scale is not None:
            if pending or sources:  # a factor on one branch of several is no factor of the whole
                sources[step] = None
                continue
            factor *= scale
        path.add(step)
        pending.extend(moved_operands(step))
    return sorted(path), list(sources), factor


def _pads_with_zero(node: Node) -> bool:
    named = operator_name(node) == "aten::pad"
    mode = argument(node, 2, "mode", "constant") if named else "constant"
    return mode == "constant" and argument(node, 3 if named else 2, "value", 0) in (None, 0, 0.0)
