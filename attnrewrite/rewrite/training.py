"""What a module does in training mode that a capture in eval mode does not show."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import CapturedGraph, ModuleCall, NodeRef, capture_call
from ..errors import first_line
from ..graph.restating import restate
from ..graph.values import is_call, operator_name
from .owners import OwnerProgram

_DROPOUTS = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"}
_LEFT_OUT = {*_DROPOUTS, "aten::contiguous", "aten::alias", "aten::clone", "aten::_assert_tensor_metadata"}
"""Dropout follows the mode in a rewritten module, too, and whether copies are made follows what it leaves in memory;
assertions compute nothing."""

_RATE = {"aten::scaled_dot_product_attention": 4}
"""Where operators are given the rate of a dropout of their own."""

Step = tuple[Any, ...]


def steps_of_training(
    owner: OwnerProgram, call: ModuleCall, look: CapturedGraph, training: CapturedGraph | None
) -> str:
    """Why the module of ``owner`` is not, in training, what it is in eval mode; an empty string if it is, but for
    dropout.

    Args:
        call: that of the module, on a ``look`` at the model in eval mode.
        training: the same look in training mode; None if the model cannot be traced so: then the module is traced
            alone.
    """
    counterpart = None if training is None else same_place(call, look, training)
    if counterpart is not None:
        eval_steps, train_steps = _steps(call, look, owner.live), _steps(counterpart, training, owner.live)  # type: ignore[arg-type]  # it has the counterpart
        if _shapes(call) != _shapes(counterpart):
            return _fewer_tokens(owner, eval_steps, train_steps)
    else:
        try:
            inputs = _arguments(owner.module, call)
            modes = [capture_call(owner.module, inputs, training=mode) for mode in (False, True)]
            for mode in modes:
                restate(mode)
        except Exception as cause:  # whatever it says: a look that could not be taken shows nothing
            return (
                f"what it does in training could not be seen ({first_line(cause)}); set the model's training steps off"
            )
        prefix = f"{call.path}." if call.path else ""
        live = {path.removeprefix(prefix) for path in owner.live}
        eval_steps, train_steps = (_steps(mode.root, mode, live) for mode in modes)
    return _difference(eval_steps, train_steps)


def _difference(in_eval: list[Step], in_training: list[Step]) -> str:
    for one, other in zip(in_eval, in_training, strict=False):
        if one != other:
            return f"in training it does something else ({other[0]} where it is {one[0]} in eval mode)"
    if len(in_eval) != len(in_training):
        longer = in_training if len(in_training) > len(in_eval) else in_eval
        return f"in training it takes other steps ({longer[min(len(in_eval), len(in_training))][0]})"
    return ""


def _fewer_tokens(owner: OwnerProgram, in_eval: list[Step], in_training: list[Step]) -> str:
    """The model gives the module something else in training, such as fewer tokens: that is no map any more."""
    if owner.reads_image or owner.fixed_to:
        return (
            "in training it is given tensors of other sizes, such as fewer tokens, which are no map of the image; "
            "leave token dropping out, or use a target that takes no map"
        )
    return _difference([step[:1] for step in in_eval], [step[:1] for step in in_training])


def _steps(call: ModuleCall, capture: CapturedGraph, live: set[str] | frozenset[str]) -> list[Step]:
    """Operators of the module's own code and of children dissolved into it, and calls of the others, in order."""
    children = [child for child in call.walk() if child is not call and child.path in live]
    outer = [child for child in children if not any(_holds(other, child) for other in children)]
    events: list[tuple[int, Step]] = [(child.enter, (f"a call of {child.path}",)) for child in outer]
    for node, position in capture.position.items():
        inside = call.encloses(position) and not any(child.encloses(position) for child in outer)
        if inside and is_call(node) and operator_name(node) not in _LEFT_OUT:
            events.append((position, (operator_name(node), *_numbers(node, capture))))
    return [step for _, step in sorted(events, key=lambda event: event[0])]


def _holds(outer: ModuleCall, inner: ModuleCall) -> bool:
    call = inner.parent
    while call is not None and call is not outer:
        call = call.parent
    return call is outer


@dataclass(frozen=True, eq=False)
class _Constant:
    """A tensor that the model holds, equal to another of the same values."""

    value: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant):
            return False
        one, two = self.value, other.value
        return one is two or (one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one, two)))


def _numbers(node: fx.Node, capture: CapturedGraph) -> Iterator[Any]:
    """What an operator is given but for values and rates of dropout."""

    found: list[Any] = []

    def note(leaf: Any) -> Any:
        value = leaf
        if isinstance(leaf, fx.Node):
            held = None if leaf in capture.inputs else capture.tensors.get(leaf)
            value = _Constant(held) if isinstance(held, Tensor) else None
        found.append(value)
        return leaf

    rate = _RATE.get(operator_name(node))
    kept = [value for place, value in enumerate(node.args) if place != rate]
    named = {name: value for name, value in node.kwargs.items() if name != "dropout_p"}
    fx.node.map_aggregate((kept, named), note)
    while found and found[-1] is None:
        found.pop()
    return iter(found)


def same_place(call: ModuleCall, look: CapturedGraph, other: CapturedGraph) -> ModuleCall | None:
    """The same call, by its number among those of its module, on another look; None if it is not made there."""
    number = next(i for i, each in enumerate(_calls(call.path, look)) if each is call)
    calls = _calls(call.path, other)
    return calls[number] if number < len(calls) else None


def _calls(path: str, capture: CapturedGraph) -> list[ModuleCall]:
    return [call for call in capture.root.walk() if call.path == path]


def _shapes(call: ModuleCall) -> list[Any]:
    return [
        tuple(leaf.node.meta["val"].shape) if isinstance(leaf, NodeRef) and leaf.node is not None else None
        for leaf in tree_leaves(call.arguments)
    ]


def _arguments(module: nn.Module, call: ModuleCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors of the captured shapes for a call of the module alone."""

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, NodeRef) or leaf.node is None:
            return leaf
        value: Tensor = leaf.node.meta["val"]
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)

    arguments = tree_map(stand_in, call.arguments)
    bound = inspect.BoundArguments(inspect.signature(module.forward), OrderedDict(arguments))
    return bound.args, bound.kwargs
