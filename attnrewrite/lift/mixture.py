"""The core of a softmax attention: product, affine scores, softmax, product with the values."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import Refusal
from ..graph.contraction import Contraction, canonical, contraction
from ..graph.dataflow import Dataflow
from ..graph.movement import moved_operands, permutation
from ..graph.values import input_of, operator_name, shape_of
from ..ir.sites import AttentionProduct, Operand
from .scores import Addend, are_scores, as_addend, excluded, score_chain
from .softmax import Softmax, softmax_at

_GROUPS = "abcghijk"
_FUSED = "aten::scaled_dot_product_attention"
_PASSING = tuple(f"aten::{name}" for name in ("contiguous", "clone", "to", "_to_copy", "alias", "slice"))
_ROW_MAJOR = {
    f"aten::{name}"
    for name in ["view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "expand"]
}


Added = tuple[tuple[Node, ...], Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Core(AttentionProduct):
    """Axes of operands are letters: batch and heads in ``groups``, ``x`` query, ``y`` key, ``d`` and ``e`` dims.

    ``bias`` is learned, ``mask`` constant; both are float64 ``[*groups or 1, queries, keys]`` or None. ``addends`` are
    the learned bias values in the graph. ``anchor`` is the node that names the place, ``nodes`` all between operands
    and output; ``weights`` are the softmax's result, unless it is fused.
    """

    anchor: Node
    scale: float
    learned_scales: tuple[Node, ...]
    addends: tuple[Node, ...]
    bias: Tensor | None
    mask: Tensor | None
    nodes: tuple[Node, ...]
    weights: Operand | None = None


def find_cores(flow: Dataflow) -> tuple[list[Core], list[tuple[Node, str]]]:
    """Every core in graph order, and the softmax nodes that are not attention, each with the reason."""
    cores, refused = [], []
    for anchor in flow.capture.graph.nodes:
        softmax = softmax_at(anchor)
        if anchor in flow.constants or (softmax is None and operator_name(anchor) != _FUSED):
            continue
        try:
            found = _fused(anchor, flow) if softmax is None else _explicit(softmax, flow)
        except Refusal as reason:
            refused.append((anchor, str(reason)))
        else:
            if found is not None:
                cores.append(found)
    return cores, refused


def _fused(anchor: Node, flow: Dataflow) -> Core:
    arguments = _bound(anchor)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    if arguments["is_causal"] or arguments["enable_gqa"]:
        raise Refusal(
            "causal and grouped-query attention are not supported",
            "give every query head its own keys, and pass a mask as attn_mask",
        )
    rank = len(shape_of(query))
    if not rank == len(shape_of(key)) == len(shape_of(value)):
        raise Refusal("query, key and value differ in rank", "give them the same leading axes")
    groups = _GROUPS[: rank - 2]
    _require_groups(groups)
    scale = arguments["scale"]
    scale = 1.0 / math.sqrt(shape_of(query)[-1]) if scale is None else float(scale)
    scores = (*shape_of(query)[:-1], shape_of(key)[-2])
    addends, bias, mask = _added(arguments["attn_mask"], scores, flow)
    parts = ((query, "xd"), (key, "yd"), (value, "ye"), (anchor, "xe"))
    q, k, v, output = (Operand(node, groups + axes) for node, axes in parts)
    return Core(q, k, v, output, anchor, groups, anchor, scale, (), addends, bias, mask, (anchor,))


def _explicit(softmax: Softmax, flow: Dataflow) -> Core | None:
    anchor = softmax.weights
    weighted = _product_with_values(anchor, flow)
    if weighted is None:
        if anchor in flow.used and are_scores(softmax.scores, flow.constants, mixed=True):
            raise Refusal(
                "an operation changes the attention weights between the softmax and their product with the values",
                "only dropout is allowed there",
            )
        return None
    path_after, final = weighted
    chain = score_chain(softmax.scores, flow.constants, flow.learned)
    product, scores = chain.product, shape_of(chain.product.node)
    weights = path_after[-1] if path_after else anchor
    laid_out = _layout(path_after, weights, product.out_axes, scores, flow)
    moves = [step for step in chain.path if flow.is_movement(step) and not flow.is_copy(step)]
    if laid_out is None or any(operator_name(step) not in _ROW_MAJOR for step in moves):
        raise Refusal(
            "the axes of the scores are rearranged between the two products",
            "keep their axes in place",
        )
    _require_last_axis(softmax, scores)
    query, key, names = _query_and_key(product)
    groups = "".join(names[axis] for axis in product.out_axes[:-1] if names[axis] != "x")
    _require_groups(groups)
    value, output = _value_and_output(final, weights, product, laid_out, names)
    addends, bias, mask = _separated(chain.addends, scores, flow)
    axes = "".join(names[axis] for axis in product.out_axes)
    bias, mask = (None if part is None else canonical(part, axes, groups + "xy") for part in (bias, mask))
    nodes = (product.node, *chain.path, *softmax.nodes, *path_after, final.node)
    scales = tuple(chain.learned_scales)
    shown = Operand(anchor, axes) if shape_of(anchor) == scores else None
    return Core(
        query, key, value, output, product.node, groups, anchor, chain.factor, scales, addends, bias, mask, nodes, shown
    )


def _layout(steps: list[Node], weights: Node, axes: str, scores: tuple[int, ...], flow: Dataflow) -> str | None:
    """The axes of ``weights``, after ``steps`` of movement from the layout of the scores; None if not known."""
    moves = [step for step in steps if not flow.is_copy(step)]
    if all(operator_name(step) in _ROW_MAJOR for step in moves):
        return axes if shape_of(weights) == scores else None
    for step in moves:
        order = permutation(step)
        if order is None:
            return None
        axes = "".join(axes[place] for place in order)
    return axes


def _query_and_key(product: Contraction) -> tuple[Operand, Operand, dict[str, str]]:
    """Which operand holds the queries: the one without the softmax axis. And the name of every axis of the scores."""
    key_axis = product.out_axes[-1]
    query_side = product.left if key_axis not in product.left_axes else product.right
    key_side = product.right if query_side is product.left else product.left
    own = [axis for axis in product.out_axes[:-1] if axis not in product.axes_of(key_side)]
    if len(product.summed) != 1 or not own or key_axis in product.axes_of(query_side):
        raise Refusal(
            "the product before the softmax is not query times key", "contract over the head dimension only"
        )
    names = {own[-1]: "x", key_axis: "y", product.summed: "d"}
    names |= dict(zip((axis for axis in product.out_axes if axis not in names), _GROUPS, strict=False))
    return _named(query_side, product, names), _named(key_side, product, names), names


def _value_and_output(
    final: Contraction, weights: Node, product: Contraction, laid_out: str, names: dict[str, str]
) -> tuple[Operand, Operand]:
    """``laid_out`` are the axes of ``product`` in the order of the axes of ``weights``."""
    value_side = final.right if final.left is weights else final.left
    theirs = dict(zip(final.axes_of(weights), laid_out, strict=True))
    last = [axis for axis in final.axes_of(value_side) if axis not in theirs]
    if len(last) != 1 or theirs.get(final.summed) != product.out_axes[-1]:
        raise Refusal(
            "the attention weights are not summed with the values over the keys", "contract over the axis of the "
            "softmax"
        )
    renamed = {axis: names[own] for axis, own in theirs.items()} | {last[0]: "e"}
    output = Operand(final.node, "".join(renamed[axis] for axis in final.out_axes))
    return _named(value_side, final, renamed), output


def _named(node: Node, product: Contraction, names: dict[str, str]) -> Operand:
    return Operand(node, "".join(names[axis] for axis in product.axes_of(node)))


def _product_with_values(anchor: Node, flow: Dataflow) -> tuple[list[Node], Contraction] | None:
    """The copies and views on the way from the softmax to the product that consumes it, and that product."""
    node = anchor
    path: list[Node] = []
    while True:
        onward = None
        for user in flow.live_users(node):
            final = contraction(user)
            if final is not None and node in (final.left, final.right) and final.left is not final.right:
                return path, final
            if flow.is_movement(user) and moved_operands(user) == [node]:
                onward = user
        if onward is None:
            return None
        path.append(onward)
        node = onward


def _require_last_axis(softmax: Softmax, scores: tuple[int, ...]) -> None:
    shape = shape_of(softmax.weights)
    if softmax.axis != len(shape) - 1 or shape[-1] != scores[-1]:
        raise Refusal("the softmax does not run over the last axis of the scores", "make the keys the last axis")


def _require_groups(groups: str) -> None:
    if not groups:
        raise Refusal("it has a single head and no batch axis", "add a batch axis")


def _separated(addends: list[Addend], scores: tuple[int, ...], flow: Dataflow) -> Added:
    """Split what is added to the scores into the learned bias and the constant mask.

    A mask that is the same for all keys changes no softmax: then the bias is what is added as a whole. Else the two add
    up to the whole as the graph rounded it.
    """
    terms = [term for addend in addends for term in _terms(addend, flow)]
    mask = _total([term for term in terms if term.node not in flow.learned], scores)
    if mask is not None and bool((mask == mask[..., :1]).all()) and not bool(excluded(mask).any()):
        mask, terms = None, addends
    learned = [term for term in terms if term.node in flow.learned]
    if any(term.factor != 1.0 for term in learned):
        raise Refusal(
            "a learned bias is scaled after being added to the scores", "scale the scores before the bias is added"
        )
    bias = _total(learned, scores)
    if bias is not None and mask is not None:
        whole = _total(addends, scores)
        assert whole is not None
        bias = torch.where(excluded(mask), bias, whole - mask)
    return tuple(term.node for term in learned if term.node is not None), bias, mask


def _added(mask: Node | None, scores: tuple[int, ...], flow: Dataflow) -> Added:
    """The same split for the additive mask of a fused attention."""
    if mask is None:
        return (), None, None
    if mask not in flow.constants:
        raise Refusal("the attention mask depends on the input", "make it a constant")
    return _separated([Addend(as_addend(flow.constants[mask]), 1.0, scores, mask)], scores, flow)


def _total(addends: list[Addend], scores: tuple[int, ...]) -> Tensor | None:
    return functools.reduce(operator.add, (addend.on(scores) for addend in addends)) if addends else None


def _terms(addend: Addend, flow: Dataflow) -> list[Addend]:
    """The summands of an addend, as far as plain additions go."""
    step = addend.node
    while step is not None and operator_name(step) in _PASSING and shape_of(step) == shape_of(input_of(step)):
        step = input_of(step)
    if step is None or operator_name(step) != "aten::add" or step.kwargs or len(step.all_input_nodes) != 2:
        return [addend]
    parts = [replace(addend, value=flow.constants[used].double(), node=used) for used in step.all_input_nodes]
    return [term for part in parts for term in _terms(part, flow)]


def _bound(anchor: Node) -> dict[str, Any]:
    schema = anchor.target._schema  # type: ignore[union-attr]  # an operator overload
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return defaults | dict(zip(names, anchor.args, strict=False)) | dict(anchor.kwargs)
