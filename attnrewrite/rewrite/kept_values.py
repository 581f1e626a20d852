"""Values that a module's forward leaves on the module for others to read, such as attention maps for a plot: a
rewritten forward leaves none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..capture.replica import replica
from .run_module import run_module

_OWN = ("_parameters", "_buffers", "_modules")


Kept = dict[str, list[Tensor]]
"""Tensors by the attribute, below a module, that holds them."""


def run_keeping(
    module: nn.Module, donor: nn.Module, arguments: dict[str, Any], training: bool
) -> tuple[list[Any], Kept]:
    """What ``run_module`` gives, and what the module keeps after it that it did not keep before."""
    before = dict(_attributes(module))
    results = run_module(module, donor, arguments, training)
    return results, {name: values for name, values in _attributes(module) if _other(values, before.get(name, []))}


def lost_values(donor: nn.Module, arguments: dict[str, Any], kept: Kept, still: Kept) -> list[str]:
    """Names of the attributes that hold something of the input, of those that ``donor`` ``kept`` and the rewritten
    module, on the same arguments and in the same mode, does not ``still`` keep.

    What is the same whatever is given, such as a cached mask, is nobody's loss.
    """
    lost = {name: values for name, values in kept.items() if name not in still}
    if not lost:
        return []
    twin = replica(donor, own_buffers=True)
    try:
        _, again = run_keeping(twin, twin, tree_map(_another, arguments), training=False)
    except Exception:  # it does not take other values, so nothing tells what is the same for all
        return list(lost)
    return [name for name, values in lost.items() if not _equal(values, again.get(name, []))]


def _attributes(root: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN and (tensors := _tensors(value)):
                yield f"{path}.{name}" if path else name, tensors


def _tensors(value: Any) -> list[Tensor]:
    held = value if isinstance(value, Tensor | list | tuple | Mapping) else None
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]


def _other(values: list[Tensor], before: list[Tensor]) -> bool:
    return len(values) != len(before) or any(a is not b for a, b in zip(values, before, strict=True))


def _equal(values: list[Tensor], others: list[Tensor]) -> bool:
    return len(values) == len(others) and all(map(torch.equal, values, others))


def _another(leaf: Any) -> Any:
    return leaf.flip(-1) if isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point() else leaf
