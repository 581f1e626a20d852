"""Hooks around rewritten modules: those that would not fire any more, and one of our own."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConversionWarning
from .image_sides import NoteImage

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SilentHooks(OrderedDict[int, Any]):
    """The hooks of the module at ``path``. A shallow copy is a plain dictionary: hooks on a replica are nobody's."""

    def __init__(self, hooks: Iterable[tuple[int, Any]] = (), path: str = "") -> None:
        super().__init__()
        self.path = path
        for key, hook in hooks:
            super().__setitem__(key, hook)

    def __setitem__(self, key: int, hook: Any) -> None:
        if self.path:
            warnings.warn(
                f"{self.path} is no longer called since the model was converted, so this hook will not fire; hook "
                "the enclosing module, or exclude the site with keep=",
                ConversionWarning,
                stacklevel=3,
            )
        super().__setitem__(key, hook)

    def __copy__(self) -> OrderedDict[int, Any]:
        return OrderedDict(self)

    def __reduce__(self) -> Any:
        return type(self), (list(self.items()), self.path)


def stay_called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing: torch's encoder layers use the weights of an ``nn.MultiheadAttention`` past its forward
    if it has none."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` calls anything else, of other people."""
    hooks = [hook for kind in _KINDS for hook in getattr(module, kind).values()]
    return any(hook is not stay_called and not isinstance(hook, NoteImage) for hook in hooks)


def is_quiet(module: nn.Module) -> bool:
    """Whether ``module`` has no hooks, and nobody is told that they would not fire."""
    return not has_hooks(module) and not isinstance(module._forward_hooks, SilentHooks)


def silence(module: nn.Module, path: str) -> None:
    """Tell who registers a hook on ``module`` from now on."""
    for kind in _KINDS:
        module.__dict__[kind] = SilentHooks(module.__dict__[kind].items(), path)


def unsilence(module: nn.Module) -> None:
    """Undo ``silence``. Hooks that were registered in spite of it stay, and their handles hold."""
    for kind in _KINDS:
        hooks = module.__dict__[kind]
        if isinstance(hooks, SilentHooks):
            hooks.path = ""
            module.__dict__[kind] = hooks or OrderedDict()
