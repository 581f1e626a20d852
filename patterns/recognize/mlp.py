"""MLPs: two linear maps with pointwise activation, gate, depthwise convolution or norm between, in any spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import UNFORESEEN, unforeseen
from ...graph.dataflow import Dataflow
from ...graph.movement import moved_operands
from ...graph.values import argument, input_of, operator_name, run_node, shape_of
from ...ir.contract import recognizer
from ...ir.sites import AttentionSite, MlpSite, Refused, Site, Stage
from ...lift.grid import token_grids
from ...numerics.activations import ACTIVATIONS, probe_points, recognize_activation

_POINTWISE = {
    f"aten::{name}"
    for name in [
        "gelu",
        "silu",
        "relu",
        "relu6",
        "relu_",
        "silu_",
        "gelu_",
        "hardswish",
        "hardswish_",
        "hardtanh",
        "hardtanh_",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "mish",
        "elu",
        "leaky_relu",
        "leaky_relu_",
        "softplus",
        "erf",
        "exp",
        "pow",
        "square",
        "mul",
        "div",
        "add",
        "sub",
        "neg",
        "clamp",
        "clamp_min",
        "abs",
        "rsub",
        "sqrt",
    ]
}


@recognizer(order=1)
def recognize_mlps(flow: Dataflow, found: list[Site]) -> list[Site | Refused]:
    """Every linear map that is fed, through an activation, by another one; convolutions of kernel 1 are left alone."""
    taken = {n for site in found if isinstance(site, AttentionSite) for n in (*site.nodes.linears, site.nodes.out_proj)}
    results: list[Site | Refused] = []
    for second in flow.nodes("aten::linear"):
        if second in flow.constants or second in taken or not flow.is_linear(second):
            continue
        try:
            walked = _walk(input_of(second), flow)
            convolves = walked is not None and any(map(flow.channel_maps.hold, (walked.first, second)))
            if walked is not None and not convolves and any(s.kind in ("activation", "gate") for s in walked.stages):
                results.append(_site(second, walked, flow))
        except UNFORESEEN as cause:
            results.append(Refused(flow.capture.enclosing_call([second]).path, "mlp", unforeseen(cause)))
    grids = token_grids(flow, [result.source for result in results if isinstance(result, MlpSite)])
    return [replace(r, grid=grids.get(r.source)) if isinstance(r, MlpSite) else r for r in results]


@dataclass
class _Walked:
    """What lies between the two maps, from back to front reversed: ``value`` is a movement of ``first``'s result."""

    first: Node
    rows: Tensor
    stages: list[Stage]


def _walk(node: Node, flow: Dataflow) -> _Walked | None:
    """Go back from the second map's operand through the stages to the first map."""
    stages: list[Stage] = []
    while True:
        linear = _linear_behind(node, flow)
        if linear is not None:
            return _Walked(*linear, stages[::-1])
        step = _through_movement(node, flow)
        stage = _residual_convolution(step, flow) or _stage(step, flow)
        if stage is None:
            return None
        stages.append(stage)
        node = stage.before


def _stage(step: Node, flow: Dataflow) -> Stage | None:
    name = operator_name(step)
    if name in _POINTWISE:
        return _activation(step, flow)
    if name == "aten::layer_norm" and len(step.args[1]) == 1:  # type: ignore[arg-type]  # a list
        return Stage("norm", step, input_of(step))
    if name == "aten::conv2d" and _is_depthwise(step):
        return Stage("convolution", step, input_of(step), grid=_map_sides(step))
    return None


def _site(second: Node, walked: _Walked, flow: Dataflow) -> MlpSite:
    nodes = [walked.first, second, *(stage.node for stage in walked.stages)]
    gates = [stage.gate for stage in walked.stages if stage.gate is not None]
    call = flow.capture.enclosing_call([*nodes, *gates])
    inner = [stage.node for stage in walked.stages if stage.kind in ("activation", "gate")]
    values = [stage.gate_value for stage in walked.stages if stage.gate_value is not None]
    owner = flow.capture.enclosing_call([*inner, *(stage.before for stage in walked.stages), *values, second])
    source: Node = input_of(walked.first)
    return MlpSite(
        name=call.path,
        owner=owner,
        width=shape_of(source)[-1],
        hidden_width=len(walked.rows),
        source=source,
        first=walked.first,
        rows=walked.rows,
        stages=tuple(walked.stages),
        second=second,
    )


def _linear_behind(node: Node, flow: Dataflow) -> tuple[Node, Tensor] | None:
    """The linear map that ``node`` rearranges without touching tokens, and which of its rows it holds."""
    if flow.is_linear(node):
        return node, torch.arange(shape_of(node)[-1])
    found = flow.provenance(node, stop=flow.is_linear)
    linear = found.source
    if linear is None or not flow.is_linear(linear):
        return None
    width = shape_of(linear)[-1]
    layouts = [found.address]
    if found.address.ndim == 4:  # a map with its channels first, as a convolution takes it
        layouts.append(found.address.movedim(1, -1))
    for address in layouts:
        tokens = address.reshape(-1, address.shape[-1])
        rows = tokens[0]
        whole = len(tokens) * width == linear.meta["val"].numel() and bool((rows >= 0).all())
        if whole and torch.equal(tokens, rows + torch.arange(len(tokens))[:, None] * width):
            return linear, rows.clone()  # a view would keep all addresses
    return None


def _through_movement(node: Node, flow: Dataflow) -> Node:
    while flow.is_movement(node):
        operands = moved_operands(node)
        if len(operands) != 1:
            break
        node = operands[0]
    return node


def _activation(last: Node, flow: Dataflow) -> Stage | None:
    """The pointwise nodes before ``last`` as an activation of one value, or of one times another."""
    inside, leaves = _pointwise_region(last, flow)
    if len(leaves) == 1:
        name = recognize_activation(_probe(inside, last, {leaves[0]: probe_points()}, flow))
        return None if name is None or name == "identity" else Stage("activation", last, leaves[0], name)
    if len(leaves) != 2:
        return None
    for main, gate in (leaves, leaves[::-1]):
        name = _gated_activation(inside, last, main, gate, flow)
        linear = _linear_behind(gate, flow)
        if name is not None and linear is not None:
            return Stage("gate", last, main, name, linear[0], gate, linear[1])
    return None


def _residual_convolution(last: Node, flow: Dataflow) -> Stage | None:
    """A value plus a depthwise convolution of it (RMT's feed-forward network)."""
    if operator_name(last) != "aten::add" or last.kwargs or not all(isinstance(part, Node) for part in last.args):
        return None
    first, second = last.args
    for value, other in ((first, second), (second, first)):
        assert isinstance(value, Node)
        assert isinstance(other, Node)
        convolution = _through_movement(other, flow)
        if operator_name(convolution) != "aten::conv2d" or not _is_depthwise(convolution):
            continue
        if shape_of(convolution) == shape_of(input_of(convolution)) and _back_in_place(value, convolution, other, flow):
            return Stage("convolution", last, value, grid=_map_sides(convolution), added=convolution)
    return None


def _back_in_place(value: Node, convolution: Node, other: Node, flow: Dataflow) -> bool:
    """Whether what is taken to the convolution comes back to where it was."""
    taken = flow.provenance(input_of(convolution), stop=lambda node: node is value)
    given = flow.provenance(other, stop=lambda node: node is convolution)
    if taken.source is not value or given.source is not convolution or shape_of(other) != shape_of(value):
        return False
    places = taken.address.flatten()[given.address.flatten()]
    return torch.equal(places, torch.arange(len(places)))


def _gated_activation(inside: list[Node], last: Node, main: Node, gate: Node, flow: Dataflow) -> str | None:
    """The activation ``f`` if the region computes ``f(main) * gate``."""
    points = probe_points()
    name = recognize_activation(_probe(inside, last, {main: points, gate: torch.ones_like(points)}, flow))
    if name is None:
        return None
    other = torch.linspace(-2.0, 3.0, len(points), dtype=torch.float64)
    product = _probe(inside, last, {main: points, gate: other}, flow)
    return name if torch.allclose(product, ACTIVATIONS[name](points) * other, rtol=1e-9, atol=1e-9) else None


def _pointwise_region(last: Node, flow: Dataflow) -> tuple[list[Node], list[Node]]:
    """The pointwise nodes that ``last`` is made of, and the values they start from."""
    inside: set[Node] = set()
    leaves: dict[Node, None] = {}
    pending = [last]
    while pending:
        node = pending.pop()
        pointwise = operator_name(node) in _POINTWISE and shape_of(node) == shape_of(last)
        if not pointwise and not (flow.is_copy(node) and inside):
            leaves[node] = None
            continue
        inside.add(node)
        pending += [used for used in node.all_input_nodes if used not in flow.constants and used not in inside]
    return sorted(inside), list(leaves)


def _probe(inside: list[Node], last: Node, values: dict[Node, Tensor], flow: Dataflow) -> Tensor:
    """Run the region on sample points instead of its values; per-channel constants make it no plain activation."""
    computed = dict(values)
    for node in inside:
        constants = {used: flow.constants[used] for used in node.all_input_nodes if used in flow.constants}
        if any(isinstance(value, Tensor) and value.numel() != 1 for value in constants.values()):
            return torch.full_like(next(iter(values.values())), math.nan)
        computed[node] = run_node(node, computed | constants, torch.float64)
    return computed[last]


def _map_sides(convolution: Node) -> tuple[int, int]:
    height, width = shape_of(convolution)[-2:]
    return height, width


def _is_depthwise(node: Node) -> bool:
    groups, stride = argument(node, 6, default=1), argument(node, 3, default=[1])
    return bool(groups == shape_of(node)[1] == shape_of(input_of(node))[1] and set(stride) == {1})
