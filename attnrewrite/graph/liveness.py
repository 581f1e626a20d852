"""Which elements of a captured value the model's outputs can depend on, read backwards from the outputs.

A value is read where an operator that is known to keep tokens apart hands the reading on: data movement by its
addresses, pointwise operators, linear maps and norms by token, products and softmax attention by query row. Any other
operator reads all it is given, so that what is said not to be read is read by nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from .contraction import Contraction, canonical, contraction
from .dataflow import Dataflow
from .values import Values, argument, input_of, is_call, operator_name, shape_of

_NORMS = {"aten::layer_norm", "aten::rms_norm"}
_SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::log_softmax"}
_ATTENTION = {"aten::scaled_dot_product_attention"}

_AT_A_TIME = 2**18
"""Elements whose addresses are looked at together: of all at once three copies would be in memory."""


def read_elements(flow: Dataflow, wanted: Iterable[Node]) -> dict[Node, Tensor]:
    """For each wanted value, a boolean tensor that broadcasts to its shape: false where no output depends on it.

    The walk ends where, before the last of the wanted values, everything that was met is read whole; what lies before
    that counts as read.
    """
    found = {node: torch.tensor(node in flow.used) for node in wanted}
    if any(operator_name(node).endswith("_") and node not in flow.constants for node in flow.capture.graph.nodes):
        return found  # what is written in place is read under other names too
    read: Values = {}
    for node in flow.outputs:
        _read(node, torch.tensor(True), read, flow)
    last = max((node for node in found if node in flow.used), default=None)
    while last is not None and read:
        node = max(read)
        if node < last and all(bool(mask.all()) for mask in read.values()):
            break
        mask = read.pop(node)
        if node in found:
            found[node] = mask
        for used, part in _handed_on(node, mask, flow):
            _read(used, part, read, flow)
    return found


def _read(node: Node, mask: Tensor, read: Values, flow: Dataflow) -> None:
    """Note that ``mask`` of ``node`` is read, at the values that its elements were moved from."""
    if node in flow.constants:
        return
    if not flow.is_movement(node):
        read[node] = read[node] | mask if node in read else mask
        return
    found = flow.provenance(node)
    own = {source: torch.zeros(source.meta["val"].numel(), dtype=torch.bool) for source in found.offsets}
    masks = mask.expand(found.address.shape).flatten().split(_AT_A_TIME)
    for addresses, masked in zip(found.address.flatten().split(_AT_A_TIME), masks, strict=True):
        address = addresses[masked]
        for source, offset in found.offsets.items():
            count = len(own[source])
            own[source][address[(address >= offset) & (address < offset + count)] - offset] = True
    for source, elements in own.items():
        elements = elements.view(shape_of(source))
        read[source] = read[source] | elements if source in read else elements


def _handed_on(node: Node, mask: Tensor, flow: Dataflow) -> list[tuple[Node, Tensor]]:
    """What ``node`` reads of its operands where ``mask`` of it is read."""
    name = operator_name(node)
    if not is_call(node) or not isinstance(node.meta["val"], Tensor):
        return [(used, torch.tensor(True)) for used in node.all_input_nodes]
    mask = mask.expand(shape_of(node))
    if flow.is_linear(node):
        return [(input_of(node), mask.any(-1, keepdim=True))]
    if name in _NORMS:
        mixed = tuple(range(-len(argument(node, 1)), 0))
        return [(used, mask.any(mixed, keepdim=True)) for used in node.all_input_nodes[:1]]
    if name in _SOFTMAX:
        return [(input_of(node), mask.any(argument(node, 1), keepdim=True))]
    if name in _ATTENTION:
        rows = mask.any(-1, keepdim=True)
        return [(input_of(node), rows), *((used, torch.tensor(True)) for used in node.all_input_nodes[1:])]
    product = contraction(node)
    if product is not None:
        factors = ((product.left, product.left_axes), (product.right, product.right_axes))
        return [(used, _unbroadcast(_of_factor(product, axes, mask), shape_of(used))) for used, axes in factors]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return [(used, _unbroadcast(mask, shape_of(used))) for used in node.all_input_nodes]
    return [(used, torch.tensor(True)) for used in node.all_input_nodes]


def _of_factor(product: Contraction, axes: str, mask: Tensor) -> Tensor:
    """A factor with these ``axes`` is read where any element of the product is that it has a part in."""
    lost = [place for place, axis in enumerate(product.out_axes) if axis not in axes]
    kept = "".join(axis for axis in product.out_axes if axis in axes)
    return canonical(mask.any(lost) if lost else mask, kept, axes)


def _unbroadcast(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An operand's element is read where any element is that it was broadcast to."""
    mask = mask.any(tuple(range(mask.ndim - len(shape)))) if mask.ndim > len(shape) else mask
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1 and mask.shape[axis] > 1)
    return mask.any(repeated, keepdim=True) if repeated else mask
