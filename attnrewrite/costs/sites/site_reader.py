"""From recognised sites to formulas, each checked against the count of its own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sympy import Expr, Integer
from torch import Tensor
from torch.fx import Node

from ...capture import ModuleCall, NodeRef
from ...graph.dataflow import Dataflow
from ...graph.values import operator_name, shape_of
from ...ir.sites import AttentionSite, Global, Grid, MapGroups, MlpSite, Reduced, Site, StemSite, Window
from ..algebra import formulas
from ..algebra.site_formula import SiteFormula, Widths
from ..count.core_calls import BY_DEFINITION
from ..count.core_formulas import Given, between_maps, core_formula
from ..count.definitions import definition_of
from .core_sites import CoreSite, core_sites
from .counted_site import AnySite, CountedSite, OwnModule
from .extents import Map, Maps, Sides
from .operator_sites import OperatorSite, operator_sites
from .regions import Regions


class SiteReader:
    """Formulas of the sites of one captured graph.

    Every contraction of the graph belongs to one site at most: a site claims its nodes, and what is claimed twice is
    read once. A formula is never believed: candidates are evaluated at the captured size, and the first that equals the
    count of the site's own nodes is taken. ``odd_up``: see ``Maps``.
    """

    def __init__(self, flow: Dataflow, sites: list[Site], odd_up: bool = True) -> None:
        self.flow, self.batch = flow, flow.capture.batch
        self.cores = core_sites(flow)
        after_cores = {core.end for core in self.cores}  # a core's result, rearranged, looks like gathered patches
        stems = [site for site in sites if isinstance(site, StemSite) and site.result not in after_cores]
        merges = [site for site in stems if site.patches is not None]
        self.maps = Maps(flow.capture, merges, odd_up)
        self._note_maps(flow.capture.root)
        self.regions = Regions(flow)
        self.sites = sites
        grids = [site.grid for site in sites if isinstance(site, AttentionSite) and site.grid is not None]
        own = operator_sites(flow)
        self.prefixes = tuple({grid.prefix_tokens for grid in grids} | {site.prefix_tokens for site in own})
        self.operators = own

    def read(self) -> list[CountedSite]:
        """In graph order.

        Claimed from the outside in: this library's modules, cores and operators, which hold what looks like sites of
        their own; then the recognised sites; last the linear maps and convolutions that nobody claimed.
        """
        found: list[tuple[Node, CountedSite]] = self._own_modules(self.flow.capture.root)
        found += [(core.query, counted) for core in self.cores if (counted := self._of_core(core)) is not None]
        for operator in self.operators:
            macs = self.regions.claim([operator.source], operator.end, operator.linears)
            if macs is not None:
                found.append((operator.node, self._counted(operator, macs, self._of_operator(operator))))
        for site in self.sites:
            sources, end, more = _bounds(site)
            macs = self.regions.claim(sources, end, more) if sources else None
            if macs:
                found.append((end, self._counted(site, macs, _FORMULAS[type(site)](self, site))))
        found += [(node, counted) for node in self.regions.unclaimed() if (counted := self._lone(node)) is not None]
        return [counted for _, counted in sorted(found, key=lambda pair: pair[0])]

    def _note_maps(self, call: ModuleCall) -> None:
        """Maps that modules of this library are known to make."""
        definition = definition_of(call.module)
        made = self._tensor(call.output) if definition is not None and definition.result is not None else None
        if definition is not None and definition.result is not None and made is not None:
            source = self._tensor(call.arguments[definition.argument])
            sides = None if source is None else self.maps.sides(definition.sides(shape_of(source)), source.next)
            if sides is not None:
                self.maps.add(Map(made, definition.result_sides(shape_of(made)), definition.result(*sides)))
        for child in call.children:
            self._note_maps(child)

    def _own_modules(self, call: ModuleCall) -> list[tuple[Node, CountedSite]]:
        """Calls of this library's attention modules; their formula is their definition, or has to equal the count."""
        definition = definition_of(call.module)
        if definition is None:
            return [pair for child in call.children for pair in self._own_modules(child)]
        source = self._tensor(call.arguments[definition.argument])
        if source is None or not definition.is_plain(call.arguments):
            return []
        size = definition.sides(shape_of(source))
        sides = self.maps.sides(size, source.next)
        formula = None if sides is None else definition.formula(call.module, *sides)
        if formula is None:
            return []
        macs = self.regions.claim_call(call)
        if definition.replaces_count:
            macs = formula.macs_of(self.batch, *self._example_size())
        describe = f"{type(call.module).__name__} on {size[0]}x{size[1]}"
        site = OwnModule(call.path, definition.kind, describe)
        return [(source, self._counted(site, macs, iter([formula]), sides))]

    def _tensor(self, reference: Any) -> Node | None:
        """The value a call was given; one without a shape stands for the model's own input, handed on as it is."""
        if not isinstance(reference, NodeRef) or reference.node is None:
            return None
        return reference.node if isinstance(reference.node.meta["val"], Tensor) else self.flow.capture.inputs[0]

    def _of_core(self, site: CoreSite) -> CountedSite | None:
        """The core with the linear maps and convolutions around it, if all of them have formulas, else alone."""
        sides = self.maps.sides((site.grid.height, site.grid.width), site.query)
        if sides is None:
            return None
        queries = sides[0] * sides[1] + site.grid.prefix_tokens
        keys = queries if site.keys == site.grid.tokens else self._tokens(site.keys, site.query)
        if keys is None:
            return None
        widths = Widths(site.width, site.heads, site.heads * site.head_dim)
        formula = core_formula(site.call.module, Given(queries, keys, sides, widths))
        if formula is None:
            return None
        inside = self.regions.inside(site.call)
        defined = isinstance(site.call.module, BY_DEFINITION)
        macs = formula.macs_of(self.batch, *self._example_size()) if defined else sum(map(self.regions.macs, inside))
        around = sorted(self.regions.counting([site.source], site.end, site.linears) - set(inside))
        maps = [_LONE.get(operator_name(node), _no_formula)(self, node) for node in around]
        known = [each for each in maps if each is not None]
        if len(known) == len(maps) and self.regions.take({*around, *inside}) is not None:
            formula, macs = between_maps(formula, known), macs + sum(map(self.regions.macs, around))
        else:
            self.regions.claim_call(site.call)
        return self._counted(site, macs, iter([formula]), sides)

    def _lone(self, node: Node) -> CountedSite | None:
        """A linear map or convolution that belongs to no site: a head, a merging, a positional convolution."""
        formula = _LONE.get(operator_name(node), _no_formula)(self, node)
        if formula is None or formula.macs_of(self.batch, *self._example_size()) != self.regions.macs(node):
            return None
        self.regions.claim([used for used in node.all_input_nodes if used not in self.flow.constants], node)
        name = self.flow.capture.enclosing_call([node]).path
        return CountedSite(name, formula.kind, formula.kind, self.regions.macs(node), formula, None)

    def _lone_linear(self, node: Node) -> SiteFormula | None:
        shape = shape_of(node.args[0])  # type: ignore[arg-type]  # a node
        tokens = self._tokens(math.prod(shape) // shape[-1] // self.batch, node)
        return None if tokens is None else formulas.linear(tokens, shape[-1], shape_of(node)[-1])

    def _lone_convolution(self, node: Node) -> SiteFormula | None:
        shape, weight = shape_of(node), shape_of(node.args[1])  # type: ignore[arg-type]  # a node
        sides = self.maps.of_cells(math.prod(shape[2:]), _after(node)) or self.maps.of_cells(
            math.prod(shape[2:]), _after(node), fixed=True
        )
        if sides is None or len(weight) != 4:
            return None
        return replace(formulas.patch_embedding(*sides, weight[1], weight[0], (weight[2], weight[3])), kind="conv")

    def _counted(
        self, site: AnySite, macs: int, candidates: Iterator[SiteFormula], sides: Sides | None = None
    ) -> CountedSite:
        sides = sides or self._sides(site)
        for formula in candidates:
            if formula.macs_of(self.batch, *self._example_size()) == macs:
                return CountedSite(site.name, formula.kind, site.describe(), macs, formula, site, sides)
        why = "no formula equals the count of its operations, which stands instead"
        return CountedSite(site.name, site.kind, site.describe(), macs, None, site, sides, why)

    def _example_size(self) -> tuple[int, int]:
        images = [self.flow.capture.tensors[node] for node in self.flow.capture.inputs]
        height, width = next(image.shape[-2:] for image in images if isinstance(image, Tensor) and image.ndim == 4)
        return height, width

    def _sides(self, site: AnySite) -> Sides | None:
        if isinstance(site, AttentionSite) and site.grid is not None:
            return self.maps.sides((site.grid.height, site.grid.width), site.nodes.product)
        if isinstance(site, OperatorSite):
            return self.maps.sides(site.size, site.node)
        if isinstance(site, StemSite):
            return self.maps.of_cells(
                site.result.meta["val"].numel() // self.batch // site.out_channels, _after(site.result)
            )
        return None

    def _tokens(self, count: int, before: Node) -> Expr | None:
        return self.maps.tokens(count, before, self.prefixes)

    def _of_attention(self, site: AttentionSite) -> Iterator[SiteFormula]:
        widths = Widths(shape_of(site.source)[-1], site.heads, site.heads * site.head_dim)
        product = site.nodes.product
        if isinstance(site.keys, MapGroups) and (sides := self._sides(site)):
            yield _of_groups(site.keys, site.map_grid, sides, widths)
        own = site.queries  # class tokens, whose number does not grow with the image
        queries = self._tokens(_axis(site, "query", "x"), product) if own is None else Integer(len(own))
        if queries is None:
            return
        if isinstance(site.keys, Global):
            yield formulas.self_attention(queries, widths)
        if isinstance(site.keys, Reduced):
            yield from self._reduced(site, site.keys, queries, widths)
        keys = self._tokens(_axis(site, "key", "y"), product)
        if keys is not None:
            key_source = site.nodes.key_source or site.source
            yield formulas.cross_attention(queries, keys, shape_of(key_source)[-1], widths)

    def _reduced(self, site: AttentionSite, keys: Reduced, queries: Expr, widths: Widths) -> Iterator[SiteFormula]:
        sides = self.maps.sides((keys.height, keys.width), site.nodes.product, fixed=True)
        if sides is None or site.grid is None:
            return
        ratio = site.grid.height // keys.height
        cells = sides[0] * sides[1]
        for kernel, convolved in ((ratio, True), (1, True), (1, False)):
            yield formulas.reduced_attention(queries, cells, kernel, convolved, widths)

    def _of_operator(self, site: OperatorSite) -> Iterator[SiteFormula]:
        sides = self.maps.sides(site.size, site.node)
        if sides is None:
            return
        widths = Widths(site.width, site.heads, site.heads * site.head_dim)
        if site.shift is not None:
            window = Window(site.kernel_size, site.shift, site.phantom)
            yield formulas.block_attention(*sides, window, widths)
        else:
            yield formulas.neighborhood_attention(*sides, site.prefix_tokens, site.kernel_size, site.dilation, widths)

    def _of_mlp(self, site: MlpSite) -> Iterator[SiteFormula]:
        shape = shape_of(site.source)
        tokens = self._tokens(math.prod(shape) // shape[-1] // self.batch, site.second)
        if tokens is None:
            return
        gated, kernel = mlp_form(site)
        yield formulas.mlp(
            tokens, site.width, site.hidden_width, shape_of(site.second)[-1], gated=gated, depthwise=kernel
        )

    def _of_stem(self, site: StemSite) -> Iterator[SiteFormula]:
        sides = self._sides(site)
        if sides is not None:
            yield formulas.patch_embedding(*sides, site.in_channels, site.out_channels, site.kernel)


_FORMULAS: dict[type, Callable[[SiteReader, Any], Iterator[SiteFormula]]] = {
    AttentionSite: SiteReader._of_attention,
    MlpSite: SiteReader._of_mlp,
    StemSite: SiteReader._of_stem,
}


def mlp_form(site: MlpSite) -> tuple[bool, int]:
    """Whether it has a gate, and the side of its convolution (0 for none)."""
    kernels = [shape_of(s.call.args[1])[-1] for s in site.stages if s.kind == "convolution"]  # type: ignore[arg-type]  # a node
    return any(stage.kind == "gate" for stage in site.stages), kernels[0] if len(kernels) == 1 else 0


def _of_groups(groups: MapGroups, grid: Grid, sides: Sides, widths: Widths) -> SiteFormula:
    if isinstance(groups, Window):
        return formulas.window_attention(*sides, groups.size, widths)
    return formulas.interleaved_attention(*sides, groups, widths, one_region=groups.is_one_region(grid))


def _bounds(site: Site) -> tuple[list[Node], Node, list[Node]]:
    """Where a site begins, its last node, and what else belongs to it."""
    if isinstance(site, AttentionSite):
        nodes = site.nodes
        after = [nodes.output.node, *nodes.linears]
        end = nodes.merged if nodes.merged is not None else max(after)
        sources = [node for node in (nodes.source,) if node is not None]
        return sources, end, [node for node in nodes.linears if node is not None]
    if isinstance(site, MlpSite):
        return [site.source], site.second, []
    return [site.source], site.result, []


def _no_formula(reader: SiteReader, node: Node) -> SiteFormula | None:
    return None


_LONE: dict[str, Callable[[SiteReader, Node], SiteFormula | None]] = {
    "aten::linear": SiteReader._lone_linear,
    "aten::conv2d": SiteReader._lone_convolution,
}


def _after(node: Node) -> Node:
    """What is made by ``node`` itself counts as made before it."""
    return node.next


def _axis(site: AttentionSite, operand: str, axis: str) -> int:
    part = getattr(site.nodes, operand)
    return shape_of(part.node)[part.axes.index(axis)]
