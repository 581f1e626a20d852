"""Which rewritten modules are alike, so that one of them stands for all in a check."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .owners import OwnerProgram

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def structure_of(owner: OwnerProgram) -> Hashable:
    """The same for modules of one class whose programs and new modules differ in nothing but parameters' values.

    Everything else is compared exactly: what a module prints rounds its numbers and leaves its buffers out.
    """
    new = tuple((name, _configuration(module)) for name, module in owner.modules.items())
    return type(owner.module), owner.program.source, new, _exact(owner.buffers)


def _configuration(module: nn.Module) -> Hashable:
    return tuple((path, type(part), _own(part)) for path, part in module.named_modules(remove_duplicate=False))


def _own(module: nn.Module) -> Hashable:
    set_by_it = {name: value for name, value in vars(module).items() if name not in _OF_ANY_MODULE}
    parameters = {
        name: None if parameter is None else (parameter.shape, parameter.dtype)
        for name, parameter in module._parameters.items()
    }
    return _exact(set_by_it), _exact(parameters), _exact(module._buffers)


def _exact(value: Any) -> Hashable:
    """Equal for equal values. What cannot be compared is equal to itself alone."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return value.shape, value.dtype, hashlib.sha256(raw).digest()
    if isinstance(value, dict):
        return tuple((key, _exact(each)) for key, each in sorted(value.items(), key=lambda item: str(item[0])))
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_exact, value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value
