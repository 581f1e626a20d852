"""Values that a module's forward leaves on the module for others to read, such as attention maps for a plot: a
rewritten forward leaves none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..capture.replica import replica
from .run_module import run_module

_OWN = ("_parameters", "_buffers", "_modules")


def kept_values(donor: nn.Module, arguments: dict[str, Any], live: Collection[str]) -> list[str]:
    """Names of the attributes, below ``donor``, that hold something of the input when it has run.

    Children at the paths ``live`` are still called, so what they keep stays right. What is the same whatever is given,
    such as a cached mask, is nobody's loss.
    """
    first = _kept(donor, arguments, live)
    if not first:
        return []
    try:
        again = _kept(donor, tree_map(_another, arguments), live)
    except Exception:  # it does not take other values, so nothing tells what is the same for all
        return list(first)
    return [name for name, values in first.items() if not _equal(values, again.get(name, []))]


def _kept(donor: nn.Module, arguments: dict[str, Any], live: Collection[str]) -> dict[str, list[Tensor]]:
    twin = replica(donor, own_buffers=True)
    before = dict(_attributes(twin, live))
    run_module(twin, twin, arguments, training=False)
    return {name: values for name, values in _attributes(twin, live) if _other(values, before.get(name, []))}


def _attributes(root: nn.Module, live: Collection[str]) -> Iterator[tuple[str, list[Tensor]]]:
    for path, module in root.named_modules():
        if not any(path == child or path.startswith(f"{child}.") for child in live):
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
