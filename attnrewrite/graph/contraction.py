"""Products that sum over an axis (``matmul``, ``bmm``, ``einsum``) in one notation: one letter per axis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from .values import argument, operator_name, shape_of

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Contraction:
    """``result[out] = sum over the rest of left[left_axes] * right[right_axes]``; one letter per axis."""

    node: Node
    left: Node
    right: Node
    left_axes: str
    right_axes: str
    out_axes: str

    def axes_of(self, operand: Node) -> str:
        return self.left_axes if operand is self.left else self.right_axes

    @property
    def summed(self) -> str:
        both = set(self.left_axes) & set(self.right_axes)
        return "".join(axis for axis in self.left_axes if axis in both and axis not in self.out_axes)

    def size(self, axis: str) -> int:
        sizes = [
            *zip(self.left_axes, shape_of(self.left), strict=True),
            *zip(self.right_axes, shape_of(self.right), strict=True),
        ]
        return max(extent for letter, extent in sizes if letter == axis)


def contraction(node: Node) -> Contraction | None:
    """Read ``node`` as a contraction of two graph values, or None."""
    name = operator_name(node)
    if name in ("aten::matmul", "aten::bmm"):
        left, right = node.args[:2]
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        if len(shape_of(left)) < 2 or len(shape_of(left)) != len(shape_of(right)):
            return None
        batch = _LETTERS[: len(shape_of(left)) - 2]
        return Contraction(node, left, right, batch + "xy", batch + "yz", batch + "xz")
    if name == "aten::einsum":
        return _einsum(node)
    return None


def _einsum(node: Node) -> Contraction | None:
    equation = str(node.args[0]).replace(" ", "")
    operands = [used for used in argument(node, 1) if isinstance(used, Node)]
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or len(terms) != 2 or not out or any(len(set(t)) != len(t) for t in terms if "." not in t):
        return None
    free = [letter for letter in _LETTERS.upper() if letter not in equation]
    hidden = [len(shape_of(used)) - len(t.replace("...", "")) for used, t in zip(operands, terms, strict=True)]
    most = max(hidden) if "..." in inputs else 0
    left, right = (t.replace("...", "".join(free[most - n : most])) for t, n in zip(terms, hidden, strict=True))
    return Contraction(node, operands[0], operands[1], left, right, out.replace("...", "".join(free[:most])))


def canonical(value: Tensor, axes: str, order: str) -> Tensor:
    """``value`` with its axes in ``order``; axes it lacks become size 1."""
    kept = [axes.index(axis) for axis in order if axis in axes]
    value = value.permute(kept)
    for position, axis in enumerate(order):
        if axis not in axes:
            value = value.unsqueeze(position)
    return value
