"""Example inputs: taken from what the model says of itself, else asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def normalize_inputs(model: nn.Module, example_inputs: Any | None) -> Inputs:
    """Positional and keyword arguments for one forward call.

    Accepts a tensor, a tuple or list of arguments, or a mapping of keyword arguments; ``None`` derives one image.
    """
    if example_inputs is None:
        return (example_inputs_for(model),), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise ArgumentError(
        f"example_inputs: expected a tensor, a tuple or a dict of tensors, got {type(example_inputs).__name__}; "
        "pass what the model's forward takes, e.g. torch.randn(1, 3, 224, 224)"
    )


def example_inputs_for(model: nn.Module) -> Tensor:
    """One seeded random image ``[1, channels, height, width]`` of the size the model states, on its device and dtype.

    Raises:
        ArgumentError: the model states no image size.
    """
    size = _stated_size(model)
    if size is None:
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} does not say which image size it takes; "
            "pass example_inputs, e.g. torch.randn(1, 3, 224, 224)"
        )
    return image_for(model, (1, *size))


def image_for(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Always the same random numbers of this ``shape``, on the model's device and in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return image.to(device=parameter.device, dtype=parameter.dtype)


def _stated_size(model: nn.Module) -> tuple[int, int, int] | None:
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    config = getattr(model, "config", None)
    sides = _sides(getattr(config, "image_size", None))
    if sides is not None:
        return (getattr(config, "num_channels", channels), *sides)
    for module in model.modules():
        for attribute in ("img_size", "image_size"):
            sides = _sides(module.__dict__.get(attribute))
            if sides is not None:
                return (channels, *sides)
    for attribute in ("pretrained_cfg", "default_cfg"):
        stated = getattr(model, attribute, None)
        size = stated.get("input_size") if isinstance(stated, Mapping) else getattr(stated, "input_size", None)
        if size is not None:
            return (channels, *size[1:])
    return None


def _sides(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None
