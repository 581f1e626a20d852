"""Leave a model exactly as it was found: mode, attributes, buffers, random state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_OWNED_BY_TORCH = {"_parameters", "_buffers", "_modules"}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore every module's mode, plain attributes and buffers, and the random state, on exit.

    Some models write to themselves in ``forward`` (a window size clamped to the map, a cached mask); what
    tracing did to them is undone here.
    """
    attributes = {module: _plain_attributes(module) for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {buffer: (buffer._version, buffer.detach().clone()) for buffer in _versioned(model)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, plain in attributes.items():
                for name in set(module.__dict__) - set(plain) - _OWNED_BY_TORCH:
                    del module.__dict__[name]
                module.__dict__.update(plain)
                module._buffers.clear()
                module._buffers.update(buffers[module])
            with torch.no_grad():
                for buffer, (version, value) in values.items():
                    if buffer._version != version:
                        buffer.copy_(value)


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    return {
        name: copy.copy(value) if type(value) in (list, dict, set) else value
        for name, value in module.__dict__.items()
        if name not in _OWNED_BY_TORCH
    }


def _versioned(model: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in model.buffers() if not buffer.is_inference())
