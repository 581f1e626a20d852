"""Between the product of query and key and the softmax: only scale, bias and mask may act.

The chain is walked back from the softmax; every step must be an affine map of the scores whose coefficients no input
reaches. What it adds is split into a learned bias and a constant mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import Refusal
from ..graph.contraction import Contraction, contraction
from ..graph.movement import is_movement
from ..graph.values import Values, argument, input_of, operator_name, shape_of

MASKED = -50.0
"""A constant score at or below this is no key at all: Swin masks with -100, others with -inf or the least float."""

LEARNED_QUERIES = "its queries are learned parameters (attention pooling); only token-to-token attention is rewritten"

_ADDING = ("aten::add", "aten::sub", "aten::add_", "aten::sub_", "aten::rsub")
_MASKING = ("aten::masked_fill", "aten::masked_fill_", "aten::where")


@dataclass(frozen=True)
class Addend:
    """``factor * value`` is added to the scores; ``shape`` is what it is broadcast to. ``node`` is its graph value."""

    value: Tensor
    factor: float
    shape: tuple[int, ...]
    node: Node | None = None

    def on(self, scores: tuple[int, ...]) -> Tensor:
        """As float64 in the layout of the product; axes it does not depend on stay size 1 where that is possible."""
        value = self.value.double() * self.factor if self.factor != 1.0 else self.value.double()
        if self.shape != scores:
            return value.expand(self.shape).reshape(scores)
        return value.reshape((1,) * (len(scores) - value.ndim) + tuple(value.shape))


@dataclass
class ScoreChain:
    """``softmax input = factor * product * learned_scales + addends``, all constant in the inputs."""

    product: Contraction
    factor: float = 1.0
    learned_scales: list[Node] = field(default_factory=list)
    addends: list[Addend] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)


def score_chain(node: Node, constants: Values, learned: frozenset[Node]) -> ScoreChain:
    """Walk back from the softmax input ``node``; ``learned`` are the constants that depend on parameters.

    Raises:
        Refusal: naming the operator in the way.
    """
    path, factor = [], 1.0
    scales: list[Node] = []
    addends: list[Addend] = []
    while (product := contraction(node)) is None:
        if node.op != "call_function":
            raise Refusal(
                "the softmax input is not a product of query and key",
                "compute the scores as a product of query and key",
            )
        path.append(node)
        name, following = operator_name(node), _operand(node, constants)
        if name in ("aten::mul", "aten::div", "aten::mul_", "aten::div_"):
            number = _number(node, following, constants, learned)
            if number is None:
                scales += [used for used in node.all_input_nodes if used is not following]
            factor *= 1.0 if number is None else number if "mul" in name else 1.0 / number
        elif name in (*_ADDING, *_MASKING) and scales:
            raise Refusal("a learned scale acts on biased scores", "scale the scores before the bias is added")
        elif name in _ADDING:
            if not _subtracts_maximum(node):
                addends.append(_addend(node, following, factor, constants))
        elif name in _MASKING:
            addends.append(_masking(node, following, factor, constants))
        elif not is_movement(node, constants):
            raise Refusal(
                f"{name} acts on the scores before the softmax",
                "only scale, bias and mask are allowed there",
            )
        node = following
    if product.left in constants or product.right in constants:
        live = product.right if product.left in constants else product.left
        if not are_scores(live, constants):
            raise Refusal(LEARNED_QUERIES)
        raise Refusal(
            f"{operator_name(node)} mixes the scores with a constant before the softmax",
            "only scale, bias and mask are allowed there",
        )
    return ScoreChain(product, factor, scales, addends, path[::-1])


def excluded(bias: Tensor) -> Tensor:
    """Where a constant bias rules a key out."""
    return bias <= MASKED


def as_addend(value: Tensor) -> Tensor:
    """A boolean mask (true: may attend) as what it adds to the scores."""
    if value.dtype == torch.bool:
        return torch.zeros(value.shape, dtype=torch.float64).masked_fill(~value, -math.inf)
    return value.double()


def are_scores(node: Node, constants: Values, mixed: bool = False) -> bool:
    """Whether it is a product of two live values already, moved, scaled or biased since; ``mixed``: or in any other way
    made of as many numbers, such as those of other heads."""
    count = math.prod(shape_of(node))
    while contraction(node) is None:
        affine = operator_name(node) in (*_ADDING, *_MASKING, "aten::mul", "aten::div")
        if not affine and not is_movement(node, constants) and not mixed:
            return False
        live = [used for used in node.all_input_nodes if used not in constants]
        if len(live) != 1 or not isinstance(live[0].meta["val"], Tensor):
            return False
        node = live[0]
        if mixed and math.prod(shape_of(node)) != count:
            return False
    return all(used not in constants for used in node.all_input_nodes)


def _operand(node: Node, constants: Values) -> Node:
    """The one operand that the inputs reach."""
    if _subtracts_maximum(node):
        return input_of(node)
    live = [used for used in node.all_input_nodes if used not in constants]
    if len(live) != 1:
        raise Refusal(
            f"{operator_name(node)} combines the scores with a value that depends on the input",
            "compute bias and mask from parameters and constants",
        )
    return live[0]


def _number(node: Node, following: Node, constants: Values, learned: frozenset[Node]) -> float | None:
    """The other factor as a number, or None if it is a learned one."""
    left, right = argument(node, 0), argument(node, 1)
    if "div" in operator_name(node) and (left is not following or right in learned):
        raise Refusal(
            "the scores are divided by a tensor, or divide one",
            "multiply them by a constant, or by one learned number per head",
        )
    other = right if left is following else left
    if not isinstance(other, Node):
        return float(other)
    if other in learned:
        return None
    value = constants[other]
    if value.numel() != 1 and not bool((value == value.flatten()[0]).all()):
        raise Refusal(
            "the scores are multiplied by a constant that differs between keys", "use one scale per head"
        )
    return float(value.flatten()[0])


def _addend(node: Node, following: Node, factor: float, constants: Values) -> Addend:
    name, left, right = operator_name(node), argument(node, 0), argument(node, 1)
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Refusal(f"{name} scales what it adds", "scale it before it is added")
    sign = -1.0 if "sub" in name else 1.0
    if sign < 0 and (left is not following or name == "aten::rsub"):
        raise Refusal("the scores are subtracted from a constant", "subtract from the scores instead")
    other = right if left is following else left
    value = constants[other] if isinstance(other, Node) else torch.tensor(float(other))
    return Addend(value, sign * factor, shape_of(node), other if isinstance(other, Node) else None)


def _masking(node: Node, following: Node, factor: float, constants: Values) -> Addend:
    if operator_name(node) == "aten::where":
        yes, no = argument(node, 1), argument(node, 2)
        condition = constants[input_of(node)]
        mask, fill = (~condition, no) if yes is following else (condition, yes)
    else:
        mask, fill = constants[input_of(node, 1)], argument(node, 2)
    number = float(constants[fill] if isinstance(fill, Node) else fill)
    value = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, number)
    return Addend(value, factor, shape_of(node))


def _subtracts_maximum(node: Node) -> bool:
    """``x - max(x)`` over the keys: shifts a softmax's input without changing its result."""
    if operator_name(node) != "aten::sub":
        return False
    scores, maximum = node.args[:2]
    if isinstance(maximum, Node) and operator_name(maximum) == "getitem":
        maximum = maximum.args[0]
    if not isinstance(maximum, Node) or operator_name(maximum) not in ("aten::max", "aten::amax"):
        return False
    return maximum.args[0] is scores and maximum.args[1] in (-1, [-1], len(shape_of(node)) - 1)
