"""The state of a converted model says that it was converted, so that loading it into another model goes not unnoticed.

Every rewritten module holds a buffer whose name says what it was converted to. Strict loading reports names that the
other model has not, or that are missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MARK = "attnrewrite_converted_to_"
"""Begins the names of these buffers."""

_ASSUMED = "attnrewrite_assumed"
"""Where the metadata of a module's state lists the marks that were added for reading it."""


def marks_of(targets: Iterable[str]) -> set[str]:
    """Their names."""
    return {MARK + re.sub(r"\W", "_", target) for target in targets}


def loaded_like(donor_class: type[nn.Module]) -> Callable[..., None]:
    """How a rewritten module of this class takes state: what was never converted is the donor's, and what a conversion
    carries over; other state has to say that it was converted to the same."""

    def _load_from_state_dict(
        self: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        if not any(key.startswith(prefix + MARK) for key in state):
            assumed = {prefix + name: torch.zeros(1) for name in _marks(self)}
            state |= assumed
            metadata = metadata | {_ASSUMED: set(assumed)}
        donor_class._load_from_state_dict(self, state, prefix, metadata, *args)

    return _load_from_state_dict


def watch_loading(model: nn.Module) -> None:
    """Have a converted model report state that was converted in part."""
    if not _watching(model):
        model.register_load_state_dict_pre_hook(require_converted_alike)


def forget_loading(model: nn.Module) -> None:
    """Undo it."""
    for key in _watching(model):
        del model._load_state_dict_pre_hooks[key]


def require_converted_alike(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    _strict: bool,
    missing: list[str],
    *_: Any,
) -> None:
    """A hook before state is loaded into a converted model: state that was converted anywhere has to be so everywhere.

    Strict loading reports the modules of the model that were not converted where the state comes from.
    """
    marked = {key for key in state if MARK in key} - metadata.get(_ASSUMED, set())
    if not marked:
        return
    for name, module in model.named_modules():
        own = f"{prefix}{name}." if name else prefix
        if not any(key.startswith(own + MARK) for key in marked):
            missing += [own + mark for mark in _marks(module)]


def _marks(module: nn.Module) -> list[str]:
    return [name for name in module._buffers if name.startswith(MARK)]


def _watching(model: nn.Module) -> list[int]:
    hooks = model._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is require_converted_alike]
