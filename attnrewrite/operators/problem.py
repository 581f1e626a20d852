"""One call of an operator as data: its operands, its geometry, what it costs and what it means.

An operator is a frozen dataclass derived from ``Problem``. Fields of type ``Tensor`` or ``Tensor | None`` are its
operands and come first; the others are its geometry, plain numbers that a graph can hold. Everything else that torch
wants to know of an operator (schema, fake, derivative, FLOPs, the flat list of arguments) follows from this one
definition; see ``operator.Operator``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import autocast

_GEOMETRY_TYPES: dict[Any, str] = {
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    tuple[int, ...]: "SymInt[]",
    tuple[bool, ...]: "bool[]",
}
"""How torch's schemas write the types that geometry may have."""


META = torch.device("meta")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its numbers: hashable, so that what is decided about a problem can be remembered."""

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = META

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Problem(ABC):
    """One call of the operator ``name``.

    What costs need of it (``macs``, ``backward_macs``) reads nothing but shapes and geometry, and works on a problem of
    ``TensorSpec`` too.
    """

    name: ClassVar[str]
    """Of the operator; its backward is called ``{name}_backward``."""

    results: ClassVar[tuple[str, ...]]
    """Names of what it returns, in order."""

    keeps_precision: ClassVar[frozenset[str]] = frozenset()
    """Operands that autocast leaves alone, and whose dtype need not be that of the others."""

    records_plain: ClassVar[bool] = False
    """Whether its plain form keeps so little for autograd that recording it beats computing it again."""

    operand_names: ClassVar[tuple[str, ...]]
    geometry_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:  # once, and not when they are asked for: a compiler cannot trace type hints
        super().__init_subclass__()
        hints = _field_types(cls)
        cls.operand_names = tuple(name for name, hint in hints.items() if hint in (Tensor, Tensor | None))
        cls.geometry_names = tuple(name for name in hints if name not in cls.operand_names)

    @abstractmethod
    def check(self) -> None:
        """Raise ``ArgumentError`` for operands and geometry that do not fit each other."""

    @abstractmethod
    def empty_results(self) -> tuple[Tensor, ...]:
        """Contiguous tensors of the shapes and dtypes of the results."""

    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of the whole call, by definition: without what a kernel computes and throws away."""

    @abstractmethod
    def backward_macs(self) -> int:
        """Those of the backward operator, with what it has to compute again."""

    def elementwise(self) -> int:
        """Operations of the forward beside its products: those of softmax and activations."""
        return 0

    @abstractmethod
    def plain(self) -> tuple[Tensor, ...]:
        """The results by public differentiable operations of torch alone, of any order of differentiation, for sizes
        that may be symbolic. It serves exporters, function transforms, and devices without a backend."""

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in self.operand_names)

    @property
    def geometry(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.geometry_names)

    @classmethod
    def of(cls, operands: Sequence[Any], geometry: Sequence[Any]) -> Self:
        """The inverse of ``operands`` and ``geometry``; lists, which torch hands over, become tuples."""
        return cls(*operands, *(tuple(each) if isinstance(each, list) else each for each in geometry))

    def with_operands(self, operands: Sequence[Tensor | None]) -> Self:
        """The same problem of other tensors."""
        return replace(self, **dict(zip(self.operand_names, operands, strict=True)))

    def check_alike(self) -> None:
        """Raise ``ArgumentError`` for an operand of another dtype or device than the first."""
        names = self.operand_names
        (first_name, first), *others = zip(names, self.operands, strict=True)
        assert first is not None
        for name, other in others:
            if other is None or name in self.keeps_precision:
                continue
            if other.dtype != first.dtype:
                raise ArgumentError(f"{name} is {other.dtype}, but {first_name} is {first.dtype}: convert one of them")
            if other.device != first.device:
                raise ArgumentError(
                    f"{name} is on {other.device}, but {first_name} on {first.device}: move one of them"
                )

    def autocast(self) -> Self:
        """The same problem with its operands cast as autocast casts them, where it is on."""
        cast = autocast(*self.operands)
        kept = (name in self.keeps_precision for name in self.operand_names)
        return self.with_operands(
            [own if keeps else other for own, other, keeps in zip(self.operands, cast, kept, strict=True)]
        )

    def specs(self) -> Self:
        """The same problem without numbers."""
        operands: list[Any] = [None if each is None else TensorSpec.of(each) for each in self.operands]
        return self.with_operands(operands)


def schema_arguments(problem: type[Problem]) -> tuple[str, str]:
    """Operands and geometry as torch's schemas write them."""
    types = _field_types(problem)
    operands = (f"Tensor{'' if types[name] is Tensor else '?'} {name}" for name in problem.operand_names)
    geometry = (f"{_GEOMETRY_TYPES[types[name]]} {name}" for name in problem.geometry_names)
    return ", ".join(operands), ", ".join(geometry)


def _field_types(problem: type[Problem]) -> dict[str, Any]:
    """Of operands and geometry, in order."""
    return {name: hint for name, hint in get_type_hints(problem).items() if get_origin(hint) is not ClassVar}
