"""Operations on the meta device, each run once for its operands' shapes.

Most of them take a millisecond of Python there, and a model repeats its blocks. What is known of a call is the layout
of its results and its price.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .cost import Cost
from .op_costs import price, tensors_of

Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Known:
    """``layouts`` of the results, one or several; None where they cannot be made anew (views, writes to operands)."""

    cost: Cost | None
    shapes: Shapes
    layouts: list[Layout] | Layout | None


class Dispatcher:
    """Runs and prices operations, those that it knows without running them."""

    def __init__(self) -> None:
        self._known: dict[Any, Known] = {}

    def run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Known]:
        """The result of a call, and what there is to know of it."""
        key = _key((operator, args, kwargs))
        known = self._known.get(key) if key is not None else None
        if known is not None and known.layouts is not None:
            return _made(known.layouts), known
        result = operator(*args, **kwargs)
        if known is None:
            known = Known(price(operator, args, kwargs, result), shapes_of((args, kwargs)), _layouts(operator, result))
            if key is not None:
                self._known[key] = known
        return result, known


def shapes_of(tree: Any) -> Shapes:
    """Of all tensors, in order."""
    return tuple(tuple(tensor.shape) for tensor in tensors_of(tree))


def _key(tree: Any) -> Any:
    """Equal for calls whose operators, layouts and numbers are; None for one that cannot be told by them."""
    if isinstance(tree, Tensor):
        return (tree.shape, tree.stride(), tree.dtype, tree.storage_offset()) if tree.is_meta else None
    if isinstance(tree, tuple | list):
        parts = [_key(part) for part in tree]
        return None if None in parts else tuple(parts)
    if isinstance(tree, dict):
        return _key(list(tree.items()))
    if getattr(type(tree), "__hash__", None) is None:
        return None
    return type(tree), tree  # 1, 1.0 and True are no equal arguments


def _layouts(operator: Any, result: Any) -> list[Layout] | Layout | None:
    schema = operator._schema
    if schema.is_mutable or any(returned.alias_info is not None for returned in schema.returns):
        return None
    if isinstance(result, Tensor):
        return _layout(result)
    if not isinstance(result, tuple) or not all(isinstance(part, Tensor) for part in result):
        return None
    parts = [_layout(part) for part in result]
    return [part for part in parts if part is not None] if None not in parts else None


def _layout(tensor: Tensor) -> Layout | None:
    """Of a tensor that owns all of its storage; a scalar that wraps a number is promoted otherwise, and is none."""
    if not tensor.is_meta or tensor.storage_offset() or tensor.ndim == 0:
        return None
    layout = tuple(tensor.shape), tensor.stride(), tensor.dtype
    same = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
    return layout if same.untyped_storage().nbytes() == tensor.untyped_storage().nbytes() else None


def _made(layouts: list[Layout] | Layout) -> Any:
    if isinstance(layouts, list):
        return tuple(map(_made, layouts))
    size, stride, dtype = layouts
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
