"""Queries and keys whose head vectors are normalized between projection and product.

A norm of every head vector alone commutes with everything that moves tokens, so the operand is read as if it were
not there. It is told by its values, on head vectors of all magnitudes and with random weights: no spelling is matched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..errors import UNFORESEEN, Refusal
from ..graph.contraction import canonical, contraction
from ..graph.dataflow import Dataflow
from ..graph.values import evaluate, is_call, shape_of
from ..ir.axes import position_and_dim
from ..ir.sites import HeadNorm, Operand
from ..numerics.head_norm import normalize_heads
from .mixture import Core
from .projections import Grouping, Projected, group_sizes, projected, read_projected

_LARGEST = 24
"""Operations that a norm is at most spelled out in."""

_SAMPLE = 256
"""Head vectors on which forms are tried; the one that fits is then compared on all."""

_CHECKS = {torch.float64: (-16.0, 3.0, 1e-9), torch.float32: (-14.0, 3.0, 2e-5)}
"""Decimal magnitudes of head vectors, and the error that is rounding. Small ones show eps, and where it stands."""

_COARSE = (-2.0, 1.0, 3e-2)

_FORMS = (("l2", "clamp"), ("l2", "root"), ("l2", "added"), ("rms", "root"), ("layer", "root"))


def normalized_parts(
    core: Core, flow: Dataflow
) -> tuple[tuple[Projected, Projected, Projected], tuple[HeadNorm | None, HeadNorm | None]] | None:
    """Query, key and value as rearranged linear maps, and the norms of query and key; None if more acts on them."""
    query, key = (_normalized(operand, core, flow) for operand in (core.query, core.key))
    value = projected(core.value, core, flow)
    if query is None or key is None or value is None:
        return None
    return (query[0], key[0], value), (query[1], key[1])


def kind_of(norms: tuple[HeadNorm | None, HeadNorm | None]) -> str:
    """What ``AttentionSite.qk`` says of the norms of queries and keys."""
    kinds = ["none" if norm is None else norm.kind for norm in norms]
    return kinds[0] if kinds[0] == kinds[1] else "/".join(kinds)


def require_scales_of_heads(core: Core, grouped: Grouping) -> None:
    """Learned scales must be one number, or one for every head in the order of the heads.

    Raises:
        Refusal: they are not.
    """
    for scale in core.learned_scales:
        shape = shape_of(scale)
        if math.prod(shape) > 1 and not _is_of_heads(scale, core, grouped):
            raise Refusal(
                f"a learned scale {list(shape)} multiplies the scores by more than one number per head",
                "use one number per head",
            )


def _is_of_heads(scale: Node, core: Core, grouped: Grouping) -> bool:
    product, shape = contraction(core.product), shape_of(scale)
    onto = next((shape_of(node) for node in core.nodes if scale in node.all_input_nodes), ())
    if product is None or shape[-2:] != (1, 1):
        return False
    names = dict(zip(product.axes_of(core.query.node), core.query.axes, strict=True))
    names |= dict(zip(product.axes_of(core.key.node), core.key.axes, strict=True))
    if "".join(names[axis] for axis in product.out_axes) != f"{core.groups}xy":
        return False
    of_group = torch.arange(math.prod(shape)).view(shape[:-2]).expand(onto[:-2]).flatten()
    if len(of_group) != math.prod(group_sizes(core)):
        return False
    heads = torch.arange(len(grouped.group_of_head))[:, None]
    return math.prod(shape) == len(heads) and bool((of_group[grouped.group_of_head] == heads).all())


def _normalized(operand: Operand, core: Core, flow: Dataflow) -> tuple[Projected, HeadNorm | None] | None:
    plain = projected(operand, core, flow)
    if plain is not None:
        return plain, None
    found = flow.provenance(operand.node, stop=flow.is_linear, scaling=True)
    region = None if found.source is None else _region(found.source, flow)
    if region is None:
        return None
    moved = flow.provenance(region.source, stop=flow.is_linear)
    assert moved.source is not None
    within = found.address
    spelling = f"{moved.spelling}, then {found.spelling}"
    part = read_projected(
        moved.source,
        spelling,
        lambda: torch.where(within < 0, -1, moved.address.flatten()[within]),
        found.factor,
        operand,
        core,
        flow,
    )
    order = core.groups + "".join(position_and_dim(operand.axes))
    vectors = canonical(within, operand.axes, order).flatten(0, -2)
    try:
        norm = _recognized(region, vectors, flow)
    except UNFORESEEN:  # what does not run alone on other values is no norm
        return None
    return None if norm is None else (part, norm)


@dataclass(frozen=True)
class _Region:
    """The operations that make ``result`` of ``source``, one rearranged linear map, and of constants alone."""

    source: Node
    result: Node
    inside: tuple[Node, ...]

    def parameters(self, flow: Dataflow) -> list[Node]:
        used = (operand for node in self.inside for operand in node.all_input_nodes)
        return list(dict.fromkeys(operand for operand in used if operand in flow.learned))

    def numbers(self, flow: Dataflow) -> list[float]:
        """Every number its operators are given, spelled out, as a default, or as a constant."""
        found: list[object] = [0.0]
        for node in self.inside:
            schema = getattr(node.target, "_schema", None)
            found += [] if schema is None else [argument.default_value for argument in schema.arguments]
            found += tree_leaves((node.args, node.kwargs))
            single = (flow.constants[used] for used in node.all_input_nodes if used in flow.constants)
            found += [v.item() for v in single if isinstance(v, Tensor) and v.numel() == 1]
        small = {float(n) for n in found if isinstance(n, int | float) and 0.0 <= n < 1.0}
        return sorted(small | {math.sqrt(n) for n in small})


def _region(result: Node, flow: Dataflow) -> _Region | None:
    inside: dict[Node, None] = {}
    sources: set[Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in inside or node in sources:
            continue
        if not isinstance(node.meta["val"], Tensor):  # several results, such as a maximum and its place
            return None
        linear = flow.provenance(node, stop=flow.is_linear).source
        if linear is not None and flow.is_linear(linear):
            sources.add(node)
            continue
        if not is_call(node) or len(inside) == _LARGEST or len(sources) > 1:
            return None
        inside[node] = None
        pending += [used for used in node.all_input_nodes if used not in flow.constants]
    if len(sources) != 1:
        return None
    (source,) = sources
    return _Region(source, result, tuple(inside)) if shape_of(source) == shape_of(result) else None


def _recognized(region: _Region, vectors: Tensor, flow: Dataflow) -> HeadNorm | None:
    """The norm that gives what the region gives, in float64 and in the dtype that the model computes in."""
    parameters = region.parameters(flow)
    if bool((vectors < 0).any()) or any(math.prod(shape_of(node)) != vectors.shape[1] for node in parameters):
        return None
    step = -(-len(vectors) // _SAMPLE)
    base = HeadNorm("", "", 0.0, region.source, region.result, vectors[::step])
    probe = _Probe(region, vectors, parameters, torch.float64, flow)
    own = region.source.meta["val"].dtype
    for norm in _candidates(base, region.numbers(flow), parameters):
        if probe.fits(norm, step):
            fits = probe.fits(norm) and _Probe(region, vectors, parameters, own, flow).fits(norm)
            return norm if fits else None
    return None


def _candidates(base: HeadNorm, numbers: list[float], parameters: list[Node]) -> Iterator[HeadNorm]:
    slots = [*parameters, *[None] * (2 - len(parameters))]
    orders = dict.fromkeys(itertools.permutations(slots)) if len(parameters) <= 2 else ()
    for (kind, place), (weight, bias), eps in itertools.product(_FORMS, orders, numbers):
        yield replace(base, kind=kind, place=place, eps=eps, weight=weight, bias=bias)


class _Probe:
    """What a region makes of head vectors of all magnitudes, with other weights than its own."""

    def __init__(
        self, region: _Region, vectors: Tensor, parameters: list[Node], dtype: torch.dtype, flow: Dataflow
    ) -> None:
        least, most, self.tolerance = _CHECKS.get(dtype, _COARSE)
        device = region.source.meta["val"].device
        given = probe_vectors(vectors, shape_of(region.source), (least, most)).to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        self.weights = {n: torch.randn(shape_of(n), generator=generator).to(device, dtype) for n in parameters}
        values = evaluate([region.result], {region.source: given, **self.weights}, flow.capture, flow.constants, dtype)
        self.given, self.made = (values[node].flatten()[vectors] for node in (region.source, region.result))

    def fits(self, norm: HeadNorm, step: int = 1) -> bool:
        weight, bias = (None if n is None else self.weights[n].flatten() for n in (norm.weight, norm.bias))
        made = normalize_heads(self.given[::step], norm.kind, norm.place, norm.eps, weight, bias)
        expected = self.made[::step]
        return bool((made - expected).abs().max() <= self.tolerance * expected.abs().max())


def probe_vectors(vectors: Tensor, shape: tuple[int, ...], magnitudes: tuple[float, float]) -> Tensor:
    """Gaussian float64 values of ``shape`` whose head vectors, at flat positions ``vectors`` ``[n, head_dim]``, have
    decimal ``magnitudes`` from the least to the greatest."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(math.prod(shape), generator=generator, dtype=torch.float64)
    order = torch.randperm(len(vectors), generator=generator)
    powers = torch.linspace(*magnitudes, len(vectors), dtype=torch.float64)[order]
    given[vectors] *= 10.0 ** powers[:, None]
    return given.view(shape)


__all__ = ["kind_of", "normalized_parts", "probe_vectors", "require_scales_of_heads"]
