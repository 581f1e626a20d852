"""Leave a model exactly as it was found: mode, attributes, buffers, random state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    containers = _containers(attributes)
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {buffer: (buffer._version, buffer.detach().clone()) for buffer in _versioned(model)}
    with torch.random.fork_rng(devices=_random_devices(model)):
        try:
            yield
        finally:
            for module, plain in attributes.items():
                for name in set(module.__dict__) - set(plain) - _OWNED_BY_TORCH:
                    del module.__dict__[name]
                module.__dict__.update(plain)
                module._buffers.clear()
                module._buffers.update(buffers[module])
            for container, content in containers:
                _refill(container, content)
            with torch.no_grad():
                for buffer, (version, value) in values.items():
                    if buffer._version != version:
                        buffer.copy_(value)


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Whatever is random inside comes out the same every time; the random state is as before on exit."""
    with torch.random.fork_rng(devices=_random_devices(model)):
        torch.manual_seed(0)
        yield


def _random_devices(model: nn.Module) -> list[int]:
    """GPUs whose random state a run of the model may move."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OWNED_BY_TORCH}


def _containers(attributes: dict[nn.Module, dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Every list, dict (of hooks, too) and set that a module holds, and a copy of its content."""
    values = (value for plain in attributes.values() for value in plain.values())
    return [(value, copy.copy(value)) for value in values if isinstance(value, list | dict | set)]


def _refill(container: Any, content: Any) -> None:
    """In place: handles and aliases refer to the container itself."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _versioned(model: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in model.buffers() if not buffer.is_inference())
