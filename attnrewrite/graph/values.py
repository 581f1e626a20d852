"""Run parts of a captured graph: fold what no input reaches, evaluate a region on chosen values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture import CapturedGraph
from ..numerics.private_kernels import private_kernel

Values = dict[Node, Any]

_SHAPE_ONLY = {
    f"aten::{name}"
    for name in ["new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"]
}
"""Operators that read only shape, dtype and device of their operand, so their result is constant in its values."""

_RANDOM = torch.Tag.nondeterministic_seeded


def fold_constants(capture: CapturedGraph) -> Values:
    """The value of every node that depends on no example input, computed in graph order.

    Buffers and constants are cloned first: a graph may write to them in place.
    """
    values: Values = {}
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            if node not in capture.inputs:
                value = capture.tensors[node]
                owned = isinstance(value, Tensor) and node not in capture.learned
                values[node] = value.clone() if owned else value
        elif is_call(node) and not _is_random(node):
            if operator_name(node) in _SHAPE_ONLY:
                values[node] = run_node(node, {used: _placeholder(used) for used in node.all_input_nodes} | values)
            elif all(used in values for used in node.all_input_nodes):
                values[node] = run_node(node, values)
    return values


def evaluate(
    targets: Iterable[Node],
    bindings: Values,
    capture: CapturedGraph,
    constants: Values,
    dtype: torch.dtype | None = None,
) -> Values:
    """Values of ``targets`` with ``bindings`` given, everything else computed from the graph.

    With ``dtype`` all floating values are computed in it, casts inside the graph included.
    """
    values: Values = dict(bindings)
    for node in needed_nodes(targets, bindings, constants):
        if node in constants:
            values[node] = cast(constants[node], dtype)
        elif node.op == "placeholder":
            values[node] = cast(capture.tensors[node], dtype)
        else:
            values[node] = run_node(node, values, dtype)
    return values


def needed_nodes(targets: Iterable[Node], *known: Mapping[Node, Any]) -> list[Node]:
    """``targets`` and all they depend on, in graph order, stopping at known nodes; the first mapping's are left out."""
    seen: set[Node] = set()
    pending = [node for node in targets if node not in known[0]]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if not any(node in mapping for mapping in known):
            pending.extend(used for used in node.all_input_nodes if used not in known[0])
    return sorted(seen)


def run_node(
    node: Node, values: Mapping[Node, Any], dtype: torch.dtype | None = None, args: tuple[Any, ...] | None = None
) -> Any:
    """Call ``node``'s operator on ``values``; ``args`` stand in the place of its own positional arguments.

    In float64 attention is computed by its formula: the fused kernel of CPUs is good to some 3e-7 only.
    """
    own = node.args if args is None else args
    args, kwargs = torch.fx.node.map_arg((own, node.kwargs), lambda used: values[used])
    if dtype is not None:
        args, kwargs = (_retarget(args, dtype), _retarget(kwargs, dtype))
    if operator_name(node) == "aten::_assert_tensor_metadata":
        return None
    if operator_name(node) == "aten::view":  # strides may differ from those of the trace
        return torch.ops.aten.reshape.default(*args)
    if dtype == torch.float64 and operator_name(node) == "aten::scaled_dot_product_attention":
        return _attention_by_formula(*args, **kwargs)  # type: ignore[arg-type]  # values, by now
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target is a function


def _attention_by_formula(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, **options: Any
) -> Tensor:
    """``torch.sdpa_kernel`` would choose the formula for every thread of the process."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    kernel = "_scaled_dot_product_attention_math"
    mixed: Tensor = private_kernel(kernel, query, key, value, attn_mask, *others, **options)[0]
    return mixed


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """``value`` in ``dtype`` where it is a floating tensor."""
    if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def digest(value: Tensor) -> str:
    """Says all that ``value`` holds, to tell by it."""
    content: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(content).hexdigest()}"


def is_call(node: Node) -> bool:
    return node.op == "call_function"


def operator_name(node: Node) -> str:
    """``aten::view`` for any overload of it; the function's own name for a Python operator."""
    if not is_call(node):
        return node.op
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


def input_of(node: Node, position: int = 0) -> Node:
    """A positional argument that is a graph value."""
    value = node.args[position]
    assert isinstance(value, Node), f"{node} takes a value at {position}"
    return value


def argument(node: Node, position: int, name: str = "", default: Any = None) -> Any:
    """An argument however it was given, or the ``default`` of the operator where it was not."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def call_beside(node: Node, target: Any, arguments: tuple[Any, ...], capture: CapturedGraph) -> Node:
    """A new call at the position of ``node`` in the trace."""
    made = capture.graph.call_function(target, arguments)
    made.meta = {**node.meta, "val": target(*torch.fx.node.map_arg(arguments, lambda used: used.meta["val"]))}
    capture.position[made] = capture.position[node]
    return made


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _placeholder(node: Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _is_random(node: Node) -> bool:
    if operator_name(node) == "aten::dropout" and not argument(node, 2, "train"):
        return False
    return _RANDOM in getattr(node.target, "tags", ())


def _retarget(arguments: Any, dtype: torch.dtype) -> Any:
    """Casts inside a graph aim at the model's dtype; in a float64 evaluation they must not round."""
    if isinstance(arguments, torch.dtype):
        return dtype if arguments.is_floating_point else arguments
    if isinstance(arguments, tuple | list):
        return type(arguments)(_retarget(value, dtype) for value in arguments)
    if isinstance(arguments, dict):
        return {name: _retarget(value, dtype) for name, value in arguments.items()}
    return arguments
