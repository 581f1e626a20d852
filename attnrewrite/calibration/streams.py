"""Read values out of a running model: what enters and leaves its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..capture.boundaries import bind_arguments
from ..errors import CalibrationError
from ..planning.places import Tap
from .images import Batch, call


class _Enough(Exception):
    """Ends a forward pass once everything asked for was seen."""


def read(model: nn.Module, batch: Batch, taps: Sequence[Tap]) -> list[Tensor]:
    """The values at ``taps``; the forward pass ends with the last of them."""
    with torch.no_grad():
        seen, _ = _run(model, batch, taps, len(set(taps)))
    return seen


def read_all(model: nn.Module, batch: Batch, taps: Sequence[Tap]) -> tuple[list[Tensor], Any]:
    """The values at ``taps`` and the model's output."""
    return _run(model, batch, taps, -1)


def calling(model: nn.Module, batch: Batch, path: str, tap: Tap) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that calls the module at ``path`` again, as the model does, and gives the value at ``tap`` in it.

    It takes other values for some of the module's parameters, by their names in the model, whose own stay as they are.
    """
    module, inside = model.get_submodule(path), model.get_submodule(tap.path)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _Enough

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            call(model, batch)
    except _Enough:
        pass
    finally:
        handle.remove()

    def again(parameters: Mapping[str, Tensor]) -> Tensor:
        own = {name.removeprefix(f"{path}."): value for name, value in parameters.items()}
        seen: dict[Tap, Tensor] = {}
        listener = _listen(inside, tap, seen, 1)
        try:
            with torch.no_grad():
                functional_call(module, own, *given[0])
        except _Enough:
            pass
        finally:
            listener.remove()
        return seen[tap]

    return again


def _run(model: nn.Module, batch: Batch, taps: Sequence[Tap], enough: int) -> tuple[list[Tensor], Any]:
    seen: dict[Tap, Tensor] = {}
    output = None
    with ExitStack() as hooks:
        for tap in dict.fromkeys(taps):
            hooks.callback(_listen(model.get_submodule(tap.path), tap, seen, enough).remove)
        with suppress(_Enough):
            output = call(model, batch)
    unseen = [tap.path for tap in taps if tap not in seen]
    if unseen:
        raise CalibrationError(f"{unseen[0]} of {type(model).__name__} was not called")
    return [seen[tap] for tap in taps], output


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode again afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _listen(module: nn.Module, tap: Tap, seen: dict[Tap, Tensor], enough: int) -> RemovableHandle:
    def note(value: Any) -> None:
        seen[tap] = tree_leaves(value)[tap.leaf]
        if len(seen) == enough:
            raise _Enough

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(bind_arguments(module, args, kwargs))

    def after(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(output)

    if tap.result:
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)
