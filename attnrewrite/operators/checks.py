"""Checks of tensor arguments that operators share; each raises ``ArgumentError``."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArgumentError


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """An optional tensor has this shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_both(first_name: str, first: Tensor | None, second_name: str, second: Tensor | None) -> None:
    """Two optional tensors are given together or not at all."""
    if (first is None) != (second is None):
        given, missing = (second_name, first_name) if first is None else (first_name, second_name)
        raise ArgumentError(f"{given} is given without {missing}: give both or neither")
