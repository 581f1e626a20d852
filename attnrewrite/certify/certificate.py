"""Translation validation: a site is accepted only if its data, evaluated, reproduces the captured subgraph."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.snapshot import same_draws
from ..errors import UNFORESEEN, first_line
from ..ir import AttentionSite, HeadNorm, MlpSite, Site, StemSite
from ..lift.dataflow import Dataflow
from ..lift.query_key_norm import probe_vectors
from ..lift.values import Values, cast, evaluate, input_of, is_call, operator_name, run_node, shape_of
from . import forms

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Largest error relative to the largest value. Float32 leaves room for another order of summation."""

_DOUBLE_WORK = 200e6
"""Multiplications in a site's projections up to which its random check is in float64; beyond, in the model's dtype."""


@dataclass(frozen=True)
class Certificate:
    """Relative errors (largest difference over largest value) of a site's form on two inputs.

    ``random`` is measured on Gaussian input, in ``random_dtype`` (float64 unless the site is very large), ``captured``
    in the model's dtype on the values that the example input gave. A NaN never passes.
    """

    random: float
    captured: float
    dtype: torch.dtype
    random_dtype: torch.dtype = torch.float64
    reason: str = ""

    @property
    def passed(self) -> bool:
        within = self.random <= TOLERANCE[self.random_dtype] and self.captured <= TOLERANCE[self.dtype]
        return within and not self.reason

    def __str__(self) -> str:
        worst = max(self.random, self.captured)
        if self.passed:
            return f"certified {worst:.0e}"
        return f"not certified ({self.reason or f'error {worst:.0e}'})"


def certify(site: Site, flow: Dataflow, captured: Values) -> Certificate:
    """Evaluate ``site``'s form and the captured subgraph on random and on captured inputs and compare.

    Args:
        captured: values of the nodes that ``wanted_nodes`` names, from one run on the example input.
    """
    dtype = captured[inputs_of(site)[0]].dtype
    dtype = dtype if dtype in TOLERANCE else torch.float64
    random_dtype = torch.float64 if _work(site, flow) <= _DOUBLE_WORK else dtype
    try:
        random_error = _error(site, flow, _random_inputs(site), random_dtype, None)
        captured_error = _error(site, flow, captured, dtype, captured)
        norms = (site.query_norm, site.key_norm) if isinstance(site, AttentionSite) else ()
        random_error = _worst(random_error, *(_norm_error(norm, flow) for norm in norms if norm is not None))
    except UNFORESEEN as cause:
        reason = f"its form does not run: {first_line(cause)}"
        return Certificate(float("nan"), float("nan"), dtype, reason=reason)
    return Certificate(random_error, captured_error, dtype, random_dtype)


def inputs_of(site: Site) -> list[Node]:
    """The values that a site's form is computed from."""
    if isinstance(site, AttentionSite):
        nodes = site.nodes
        if site.query is None:
            return [nodes.query.node, nodes.key.node, nodes.value.node]
        return list(dict.fromkeys([site.source, nodes.key_source or site.source]))
    return [site.source]


def output_of(site: Site) -> Node:
    """The captured value that a site's form reproduces."""
    if isinstance(site, AttentionSite):
        return site.nodes.output.node if site.nodes.merged is None else site.result
    return site.result


def wanted_nodes(sites: Iterable[Site]) -> set[Node]:
    """The captured values that certification compares with."""
    return {node for site in sites for node in (*inputs_of(site), output_of(site))}


def collect_values(flow: Dataflow, wanted: set[Node]) -> Values:
    """Run the captured graph once on the example inputs, with the ``same_draws``, and keep the ``wanted`` values."""
    capture = flow.capture
    values: Values = dict(flow.constants) | {node: capture.tensors[node] for node in capture.inputs}
    uses = {node: len(node.users) for node in capture.graph.nodes}
    in_place = any(operator_name(n).endswith("_") and n not in flow.constants for n in capture.graph.nodes)
    kept: Values = {}
    last = max(wanted, default=None)
    with torch.no_grad(), same_draws(capture.model):
        for node in capture.graph.nodes:
            if is_call(node) and node not in flow.constants:
                values[node] = run_node(node, values)
                for used in node.all_input_nodes:
                    uses[used] -= 1
                    if not uses[used] and used not in flow.constants:
                        del values[used]
            if node in wanted:
                kept[node] = values[node].clone() if in_place else values[node]
            if node is last:
                break
    return kept


def _error(site: Site, flow: Dataflow, inputs: Values, dtype: torch.dtype, captured: Values | None) -> float:
    """One comparison; the captured subgraph is run unless its result is known already."""
    bindings = {node: cast(inputs[node], dtype) for node in inputs_of(site) if node in inputs}
    wanted = [*inputs_of(site), output_of(site)]
    double = dtype == torch.float64  # casts to float32 inside the model would be measured with it
    if captured is None or double or dtype != captured[output_of(site)].dtype:
        values = evaluate(wanted, bindings, flow.capture, flow.constants, dtype)
    else:
        values = {node: captured[node] for node in wanted}

    @cache
    def weights(node: Node) -> Tensor:
        return cast(flow.constants[node], dtype)

    expected = _arranged(site, values[output_of(site)])
    actual = form(site, values, weights)
    if actual.shape != expected.shape:
        raise ValueError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    return relative_error(actual, expected)


def _norm_error(norm: HeadNorm, flow: Dataflow) -> float:
    """A norm alone on head vectors of all magnitudes: on Gaussian ones nothing tells its eps."""
    given = probe_vectors(norm.vectors, shape_of(norm.source), (-16.0, 3.0)).to(norm.source.meta["val"].device)
    made = evaluate([norm.node], {norm.source: given}, flow.capture, flow.constants, torch.float64)[norm.node]
    actual = forms.normalised(given.flatten()[norm.vectors], norm, lambda node: flow.constants[node].double())
    return relative_error(actual, made.flatten()[norm.vectors])


def _worst(*errors: float) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).max())  # a NaN is the worst


def form(site: Site, values: Values, weights: forms.Weights) -> Tensor:
    """The site's lifted form on given values of its inputs."""
    if isinstance(site, MlpSite):
        return forms.mlp(site, values[site.source], weights)
    if isinstance(site, StemSite):
        return forms.stem(site, values[site.source], weights)
    if site.query is None:
        parts = (site.nodes.query, site.nodes.key, site.nodes.value)
        query, key, value = (forms.operand_heads_last(values[part.node], part, site) for part in parts)
        return forms.attend(site, query, key, value, weights)
    source, key_source = (values[node] for node in (site.source, site.nodes.key_source or site.source))
    return forms.attention(site, source, key_source, weights)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value; NaN if either has one."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _work(site: Site, flow: Dataflow) -> float:
    """Multiplications in the site's linear maps, for its tokens."""
    if isinstance(site, AttentionSite):
        linears = {node for node in (*site.nodes.linears, site.nodes.merged) if node is not None}
    else:
        linears = {site.first, site.second} if isinstance(site, MlpSite) else set()
    sizes = ((flow.constants[input_of(node, 1)].numel(), shape_of(node)) for node in linears)
    return sum(weights * math.prod(shape[:-1]) for weights, shape in sizes)


def _arranged(site: Site, value: Tensor) -> Tensor:
    """The captured result in the layout that the form gives."""
    if not isinstance(site, AttentionSite):
        return value
    if site.nodes.merged is None:
        return forms.operand_heads_last(value, site.nodes.output, site)
    if site.queries is not None:
        return value.reshape(-1, len(site.queries), shape_of(site.nodes.merged)[-1])
    return forms.tokens(value.reshape(*shape_of(site.source)[:-1], -1), site.nodes.batch_axis)


def _random_inputs(site: Site) -> Values:
    """Gaussian values for the first input, from which the graph computes the others if it can."""
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_of(site)
    independent = inputs if not isinstance(site, AttentionSite) or site.query is None else inputs[:1]
    return {
        node: torch.randn(shape_of(node), generator=generator).double().to(node.meta["val"].device)
        for node in independent
    }
