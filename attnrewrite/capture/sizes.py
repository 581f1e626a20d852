"""Sizes as values: which of a forward's numbers and branches come from the shapes of its tensors.

``tensor.shape`` gives integers, and a trace keeps what they were. While a ``SizeTracker`` is entered it gives integers
that remember where they come from: arithmetic on them is noted as a ``Term``, and a comparison, which may decide the
course of the forward, as a ``Decision``. Nothing else about them is special: they are ``int`` and ``float``.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode

from .module_call import ModuleCall
from .size_terms import Arithmetic, Number, Side, Term

_TORCH = f"{torch.__path__[0]}/"

_EXTREMES = f"{_TORCH}_export/non_strict_utils.py"
"""Where an exporter has what it puts in the place of ``max`` and ``min``: what these compare the forward decides."""


@dataclass(frozen=True)
class Decision:
    """A comparison of sizes: ``function(*operands)`` was ``outcome``, inside ``call``, in code at ``place``."""

    function: Callable[..., Any]
    operands: tuple[Term | Number, ...]
    outcome: bool
    call: ModuleCall | None
    place: tuple[str, int, int]

    def __str__(self) -> str:
        file, line, _ = self.place
        return f"a comparison of sizes ({self.function.__name__}, {file.rpartition('/')[2]}:{line})"


@dataclass(frozen=True)
class Given:
    """The numbers that one operator was given, each with its term if it comes from sizes; its nodes are those from
    trace position ``start`` to ``stop``. ``index`` is what a tensor was indexed with, if that is what it was."""

    start: int
    stop: int
    numbers: tuple[tuple[Number, Term | None], ...]
    index: tuple[Any, ...] | None = None

    def terms_of(self, numbers: list[Any]) -> list[set[Term | None]]:
        """Of the ``numbers`` of one of the nodes, the terms: by their order if that is the same, else by value: then
        there may be several, and none for what the operator itself computed."""
        if [number for number, _ in self.numbers] == numbers:
            return [{term} for _, term in self.numbers]
        by_value: dict[Number, set[Term | None]] = {}
        for number, term in self.numbers:
            by_value.setdefault(number, set()).add(term)
        return [by_value.get(number, set()) for number in numbers]


@dataclass
class SizeRecord:
    """Everything a forward computed from sizes, in order, each with the trace position at which it did; where it used
    what it computed; and the numbers that it ``lost``, for ``int`` and ``math.sqrt`` give plain ones. ``running`` gives
    the module call that is being traced."""

    terms: list[tuple[int, Term]] = field(default_factory=list)
    lost: list[tuple[int, Number]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    running: Callable[[], ModuleCall | None] = field(default=lambda: None, repr=False)

    def given_at(self, position: int) -> Given | None:
        """What the operator that made the node at a trace position was given, where that comes from sizes."""
        return self._places.get(position)

    @cached_property
    def _places(self) -> dict[int, Given]:
        return {place: each for each in self.given for place in range(each.start, each.stop)}

    def resolve(self, final: Callable[[Node], Node | None]) -> tuple[SizeRecord, Callable[[Any], Any]]:
        """The record with the nodes of the final graph, and how a term is said with them."""
        known: dict[Term, Term] = {}

        def resolved(term: Any) -> Any:
            if not isinstance(term, Side | Arithmetic):
                return term
            if term not in known:
                if isinstance(term, Arithmetic):
                    known[term] = Arithmetic(term.function, tuple(map(resolved, term.operands)))
                else:
                    known[term] = replace(term, node=None if term.node is None else final(term.node))
            return known[term]

        record = SizeRecord(
            [(position, resolved(term)) for position, term in self.terms],
            self.lost,
            [replace(each, operands=tuple(map(resolved, each.operands))) for each in self.decisions],
            [replace(each, numbers=tuple((n, resolved(term)) for n, term in each.numbers)) for each in self.given],
        )
        return record, resolved


class SizeTracker(TorchFunctionMode):
    """Gives integers with a memory for the shapes of traced tensors."""

    def __init__(self, running: Callable[[], ModuleCall | None]) -> None:
        super().__init__()
        self.record = SizeRecord(running=running)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = _position()
        result = func(*args, **(kwargs or {}))
        self._note(func, start, args, kwargs)
        if func in _GETTERS:
            return self._tracked(args[0], result, args[1:], kwargs or {})
        if func is torch.Tensor.numel and (node := _node_of(args[0])) is not None:
            count: Any = 1
            for axis, extent in enumerate(args[0].shape):
                count = _Extent(extent, Side(node, axis, extent), self.record) * count
            return count
        return result

    def _note(self, func: Any, start: int, args: Any, kwargs: Any) -> None:
        stop = _position()
        if stop == start:
            return
        numbers = [leaf for leaf in _flat((args, kwargs or {})) if _is_number(leaf)]
        # what torch does in Python may compute numbers of its own from shapes
        if any(isinstance(number, _Tracked) for number in numbers) or hasattr(func, "__code__"):
            terms = tuple((plain(number), getattr(number, "term", None)) for number in numbers)
            index = _plain_index(args[1]) if func is torch.Tensor.__getitem__ else None
            self.record.given.append(Given(start, stop, terms, index))

    def _tracked(self, tensor: Tensor, sizes: Any, axis: tuple[Any, ...], named: dict[str, Any]) -> Any:
        node = _node_of(tensor)
        if node is None:
            return sizes
        if isinstance(sizes, int):
            along = int((*axis, *named.values())[0]) % tensor.ndim
            return _Extent(sizes, Side(node, along, sizes), self.record)
        sides = [Side(node, place, size) for place, size in enumerate(sizes)]
        return torch.Size([_Extent(side.extent, side, self.record) for side in sides])


_GETTERS = {torch.Tensor.shape.__get__, torch.Tensor.size}  # type: ignore[attr-defined]  # a getter


def plain(number: Any) -> Any:
    """A tracked number as the number that it is; anything else as it is."""
    if isinstance(number, _Extent):
        return int.__index__(number)
    return float.__float__(number) if isinstance(number, _Measure) else number


def _node_of(tensor: Any) -> Node | None:
    mode = get_proxy_mode()
    if mode is None or not isinstance(tensor, Tensor):
        return None
    slot = get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


class _Tracked:
    """A number that remembers where it comes from: its ``term``. A copy of it, or what is read back, is a plain one."""

    term: Term
    record: SizeRecord

    def __new__(cls, value: Number, term: Term, record: SizeRecord) -> Self:
        made = super().__new__(cls, value)  # type: ignore[call-arg]  # of the number that it also is
        made.term, made.record = term, record
        return made

    def __deepcopy__(self, memo: Any) -> Number:
        number: Number = plain(self)
        return number

    def __reduce__(self) -> Any:
        number = plain(self)
        return type(number), (number,)


class _Extent(_Tracked, int):
    pass


class _Measure(_Tracked, float):
    pass


def _computed(function: Callable[..., Any], *operands: Any) -> Any:
    """``function`` of plain numbers, with its term."""
    result = function(*map(plain, operands))
    record = next(operand.record for operand in operands if isinstance(operand, _Tracked))
    term = Arithmetic(function, tuple(getattr(operand, "term", operand) for operand in operands))
    if type(result) is int:
        made: Any = _Extent(result, term, record)
    elif type(result) is float:
        made = _Measure(result, term, record)
    else:
        return result
    record.terms.append((_position(), term))
    return made


def _decided(function: Callable[..., Any], *operands: Any) -> Any:
    outcome = function(*map(plain, operands))
    record = next(operand.record for operand in operands if isinstance(operand, _Tracked))
    terms = tuple(getattr(operand, "term", operand) for operand in operands)
    frame = _asking_frame(3)
    if frame is not None:
        place = (frame.f_code.co_filename, frame.f_lineno, frame.f_lasti)
        record.decisions.append(Decision(function, terms, bool(outcome), record.running(), place))
    return outcome


def _lost(function: Callable[[Any], Number]) -> Callable[[Any], Number]:
    """``int`` or ``float`` of a tracked number: a plain one, for Python makes it so."""

    def converted(self: Any) -> Number:
        if _asking_frame(2) is not None:
            self.record.lost.append((_position(), function(plain(self))))
        return function(plain(self))

    return converted


def _asking_frame(depth: int) -> FrameType | None:
    """The code that asks something of a number; None if that is torch: what torch asks is the operator's affair."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_code.co_filename == _EXTREMES:
        frame = frame.f_back
    return None if frame is None or frame.f_code.co_filename.startswith(_TORCH) else frame


def _position() -> int:
    mode = get_proxy_mode()
    return -1 if mode is None else len(mode.tracer.graph.nodes)


def _plain_index(index: Any) -> tuple[Any, ...] | None:
    """Of slices and numbers, as a tuple of plain ones; None if tensors index."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or isinstance(part, slice) or _is_number(part) for part in parts):
        return None
    return tuple(
        slice(plain(part.start), plain(part.stop), plain(part.step)) if isinstance(part, slice) else plain(part)
        for part in parts
    )


def _flat(arguments: Any) -> Iterator[Any]:
    """The leaves of an operator's arguments, those of slices too, in order."""
    if isinstance(arguments, slice):
        arguments = (arguments.start, arguments.stop, arguments.step)
    if isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _flat(argument)
    elif isinstance(arguments, dict):
        yield from _flat(tuple(arguments.values()))
    else:
        yield arguments


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _binary(function: Callable[..., Any], note: Callable[..., Any]) -> tuple[Any, Any]:
    def forward(self: Any, other: Any) -> Any:
        return note(function, self, other) if _is_number(other) else NotImplemented

    def reflected(self: Any, other: Any) -> Any:
        return note(function, other, self) if _is_number(other) else NotImplemented

    return forward, reflected


def _unary(function: Callable[..., Any]) -> Any:
    return lambda self, *digits: _computed(function, self, *digits)


def _divided(left: Number, right: Number) -> tuple[Number, Number]:
    return left // right, left % right


for _kind in (_Extent, _Measure):
    for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
        _forward, _reflected = _binary(getattr(operator, _name), _computed)
        setattr(_kind, f"__{_name}__", _forward)
        setattr(_kind, f"__r{_name}__", _reflected)
    for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _binary(getattr(operator, _name), _decided)[0])
    for _name, _function in (
        ("neg", operator.neg), ("abs", abs), ("round", round), ("ceil", math.ceil), ("floor", math.floor),
        ("trunc", math.trunc),
    ):  # fmt: skip
        setattr(_kind, f"__{_name}__", _unary(_function))
    _kind.__int__ = _lost(int)  # type: ignore[assignment]
    _kind.__float__ = _lost(float)  # type: ignore[method-assign]
    _kind.__bool__ = lambda self: _decided(operator.ne, self, 0)  # type: ignore[method-assign]  # ``if height % 7:``
    _kind.__divmod__ = lambda self, other: (self // other, self % other)  # type: ignore[method-assign]  # both have terms
    _kind.__hash__ = lambda self: hash(plain(self))  # type: ignore[method-assign]  # equality is a decision, not identity
