"""Which keyword arguments a module's code could read, where it takes any (``**kwargs``).

Trainers pass arguments down that are for somebody else (``num_items_in_batch``, which the loss reads). One may pass by
a rewritten module if the code that was rewritten cannot have read it. What can be read of ``**kwargs`` is spelled out
in the code that runs, as a parameter or a constant, or in what that code names, unless it goes through all of them; so
that code is seen running.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..numerics.draws import same_draws
from .examples import Inputs
from .replica import replica

_STRANGER = "attnrewrite_stranger"

_MOST = 1000
"""Containers with more strings hold data."""


def names_read(model: nn.Module, example: Inputs) -> dict[str, frozenset[str]]:
    """By the path of every module that takes any keyword argument: the strings in the code that its calls ran, in eval
    and in training mode.

    Empty where that is no evidence: the model does not run, or does anything with keyword arguments that it cannot
    know.
    """
    seen = _Seen()
    try:
        expected = _outputs(model, example, None, training=False)
        actual = _outputs(model, example, seen, training=False)
        _outputs(model, example, seen, training=True)
    except Exception:  # most of all: it takes no argument of that name
        return {}
    same = len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    if not same or seen.stranger.touched:
        return {}
    return {path: frozenset().union(*codes.values()) for path, codes in seen.codes.items()}


def _outputs(model: nn.Module, example: Inputs, seen: _Seen | None, training: bool) -> list[Tensor]:
    """What the model gives, with strangers among its keyword arguments if it is ``seen``."""
    twin = replica(model, training=training, own_buffers=True)
    args, kwargs = example
    with torch.no_grad(), same_draws(model.parameters()), nullcontext() if seen is None else seen.profiling(twin):
        output = twin(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def takes_any_keyword(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def is_read(name: str, read: frozenset[str] | None) -> bool:
    """Whether code that holds these strings may read the keyword ``name``, spelled out or made of parts (``"output_" +
    kind``). Without such evidence it may."""
    if read is None:
        return True
    words = name.split("_")
    heads = accumulate(words[:-1], lambda head, word: f"{head}{word}_", initial="")
    tails = accumulate(reversed(words[1:]), lambda tail, word: f"_{word}{tail}", initial="")
    return name in read or any(part in read for part in (*heads, *tails) if part)


class _Stranger(Tensor):
    """A keyword argument that no code can know: who touches it goes through all that it is given."""

    touched = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for value in args:
            if isinstance(value, _Stranger):
                value.__dict__["touched"] = True
        return super().__torch_function__(func, types, args, kwargs or {})


class _Seen:
    """The code that ran during the calls of every module, by its path."""

    def __init__(self) -> None:
        self.codes: dict[str, dict[CodeType, set[str]]] = {}
        self.stranger: _Stranger = torch.zeros(1).as_subclass(_Stranger)
        self.stranger.__dict__["touched"] = False
        self._open: list[str] = []

    def enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._open.append(path)
            self.codes.setdefault(path, {})
            return args, kwargs | {_STRANGER: self.stranger, f"{_STRANGER}_number": 3.0}

        return hook

    def leave(self, *_: Any) -> None:
        self._open.pop()

    @contextmanager
    def profiling(self, model: nn.Module) -> Iterator[None]:
        """While ``model`` runs in this thread."""
        for path, module in model.named_modules():
            if takes_any_keyword(module):
                module.register_forward_pre_hook(self.enter(path), with_kwargs=True)
                module.register_forward_hook(self.leave, prepend=True)
        before = sys.getprofile()
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            for codes in map(self.codes.__getitem__, self._open):
                if frame.f_code not in codes:
                    codes[frame.f_code] = _strings(frame.f_code) | _named(frame)


def _named(frame: FrameType) -> set[str]:
    """What the code of a frame names, and strings in that: globals, variables of functions around it, defaults, and
    attributes of a module that it is given."""
    code = frame.f_code
    values = [*code.co_names, *(frame.f_globals.get(name) for name in code.co_names), *frame.f_locals.values()]
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(owner, nn.Module):
        values += [vars(owner).get(name, getattr(type(owner), name, None)) for name in code.co_names]
    return {text for value in values for text in _texts(value)}


def _texts(value: Any) -> Iterator[str]:
    """A string, or those in a container of some, which the keyword arguments themselves are not."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list | set | frozenset | dict) and len(value) <= _MOST and _STRANGER not in value:
        for part in (*value, *(value.values() if isinstance(value, dict) else ())):
            if isinstance(part, str):
                yield part


def _strings(code: CodeType) -> set[str]:
    """Parameters and constants of a function and of those it defines."""
    found = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    pending = list(code.co_consts)
    while pending:
        constant = pending.pop()
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple | frozenset):
            pending += constant
        elif isinstance(constant, CodeType):
            found |= _strings(constant)
    return found
