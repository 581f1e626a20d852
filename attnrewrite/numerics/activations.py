"""Activations, recognized by their values and not by how they are spelled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "squared_relu": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


OPERATIONS = {"gelu": 5, "gelu_tanh": 5, "silu": 3, "hardswish": 4, "mish": 5, "elu": 3}
"""Elementwise operations of an activation, where it is more than one."""


def probe_points() -> Tensor:
    """Where activations are compared: both tails, the bend, and points between."""
    return torch.linspace(-8.0, 8.0, 401, dtype=torch.float64)


def recognize_activation(values: Tensor) -> str | None:
    """The activation whose values at ``probe_points`` are ``values``, or None."""
    points = probe_points()
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(values, activation(points), rtol=1e-9, atol=1e-9):
            return name
    return None
