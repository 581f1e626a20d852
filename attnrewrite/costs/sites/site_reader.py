"""From recognized sites to formulas, each checked against the count of its own operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...algebra.core_formula import CoreSizes, between_maps, core_formula
from ...algebra.module_formula import costed_module
from ...algebra.site_formula import SiteFormula, Widths
from ...capture import Capture, ModuleCall, NodeRef
from ...graph.dataflow import Dataflow
from ...graph.values import shape_of
from ...ir.sites import AttentionSite, MlpSite, Site, StemSite
from .candidates import Candidates
from .core_sites import CoreSite, core_sites
from .counted_site import AnySite, CountedSite, OwnModule
from .extents import Map, Maps, Sides
from .operator_sites import operator_sites
from .regions import Regions


class SiteReader:
    """Formulas of the sites of one captured model.

    Every contraction of the graph belongs to one site at most, the first that claims it. A formula is never believed:
    candidates are evaluated at the captured size, and the first that equals the count of the site's own nodes is taken.
    ``odd_up``: see ``Maps``.
    """

    def __init__(self, capture: Capture, flow: Dataflow, sites: list[Site], odd_up: bool = True) -> None:
        self.capture, self.flow, self.batch = capture, flow, capture.batch
        self.cores = core_sites(capture, flow)
        after_cores = {core.end for core in self.cores}  # a core's result, rearranged, looks like gathered patches
        stems = [site for site in sites if isinstance(site, StemSite) and site.result not in after_cores]
        merges = [site for site in stems if site.patches is not None]
        self.maps = Maps(flow.capture, merges, odd_up)
        self._note_maps(flow.capture.root)
        self.regions = Regions(flow)
        self.sites, self.operators = sites, operator_sites(flow)
        grids = [site.grid for site in sites if isinstance(site, AttentionSite) and site.grid is not None]
        grids += [core.grid for core in self.cores]
        prefixes = {grid.prefix_tokens for grid in grids} | {site.prefix_tokens for site in self.operators}
        self.candidates = Candidates(self.maps, tuple(prefixes), self.batch)

    def read(self) -> list[CountedSite]:
        """In graph order.

        Claimed from the outside in: this library's modules, cores and operators, which hold what looks like sites of
        their own; then the recognized sites; last the linear maps and convolutions that nobody claimed.
        """
        found: list[tuple[Node, CountedSite]] = self._own_modules(self.flow.capture.root)
        found += [(core.query, counted) for core in self.cores if (counted := self._of_core(core)) is not None]
        for operator in self.operators:
            macs = self.regions.claim([operator.source], operator.end, operator.linears)
            if macs is not None:
                found.append((operator.node, self._counted(operator, macs, self.candidates.of(operator))))
        for site in self.sites:
            sources, end, more = _bounds(site)
            macs = self.regions.claim(sources, end, more) if sources else None
            if macs:
                found.append((end, self._counted(site, macs, self.candidates.of(site))))
        found += [(node, counted) for node in self.regions.unclaimed() if (counted := self._lone(node)) is not None]
        return [counted for _, counted in sorted(found, key=lambda pair: pair[0])]

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Of the image at capture."""
        images = [self.flow.capture.tensors[node] for node in self.flow.capture.inputs]
        height, width = next(image.shape[-2:] for image in images if isinstance(image, Tensor) and image.ndim == 4)
        return height, width

    def _note_maps(self, call: ModuleCall) -> None:
        """Maps that modules of this library are known to make."""
        module = costed_module(self.capture.module_of(call))
        made = self._tensor(call.output)
        if module is not None and module.costed_call.result is not None and made is not None:
            read = module.costed_call
            source = self._tensor(call.arguments[read.argument])
            sides = None if source is None else self.maps.sides(read.sides(shape_of(source)), source.next)
            if sides is not None:
                self.maps.add(Map(made, read.result_sides(shape_of(made)), module.costed_call.result(*sides)))
        for child in call.children:
            self._note_maps(child)

    def _own_modules(self, call: ModuleCall) -> list[tuple[Node, CountedSite]]:
        """Calls of this library's attention modules; their formula is their definition, or has to equal the count."""
        module = costed_module(self.capture.module_of(call))
        if module is None:
            return [pair for child in call.children for pair in self._own_modules(child)]
        read = module.costed_call
        source = self._tensor(call.arguments[read.argument])
        if source is None or not read.is_plain(call.arguments):
            return []
        size = read.sides(shape_of(source))
        sides = self.maps.sides(size, source.next)
        formula = None if sides is None else module.formula(*sides)
        if formula is None:
            return []
        macs = self.regions.claim_call(call)
        if read.counted_by_formula:
            macs = formula.macs_of(self.batch, *self._size)
        describe = f"{call.kind.rpartition('.')[2]} on {size[0]}x{size[1]}"
        site = OwnModule(call.path, read.kind, describe)
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
        keys = queries if site.keys == site.grid.tokens else self.candidates.tokens(site.keys, site.query)
        if keys is None:
            return None
        widths = Widths(site.width, site.heads, site.heads * site.head_dim)
        formula = core_formula(site.module, CoreSizes(queries, keys, sides, widths))
        if formula is None:
            return None
        inside = self.regions.inside(site.call)
        by_formula = site.module.counted_by_formula
        macs = formula.macs_of(self.batch, *self._size) if by_formula else sum(map(self.regions.macs, inside))
        around = sorted(self.regions.counting([site.source], site.end, site.linears) - set(inside))
        maps = [self.candidates.of_node(node) for node in around]
        known = [each for each in maps if each is not None]
        if len(known) == len(maps) and self.regions.take({*around, *inside}) is not None:
            formula, macs = between_maps(formula, known), macs + sum(map(self.regions.macs, around))
        else:
            self.regions.claim_call(site.call)
        return self._counted(site, macs, iter([formula]), sides)

    def _lone(self, node: Node) -> CountedSite | None:
        """A linear map or convolution that belongs to no site: a head, a merging, a positional convolution."""
        formula = self.candidates.of_node(node)
        if formula is None or formula.macs_of(self.batch, *self._size) != self.regions.macs(node):
            return None
        self.regions.claim([used for used in node.all_input_nodes if used not in self.flow.constants], node)
        name = self.flow.capture.enclosing_call([node]).path
        return CountedSite(name, formula.kind, formula.kind, self.regions.macs(node), formula, None)

    def _counted(
        self, site: AnySite, macs: int, candidates: Iterator[SiteFormula], sides: Sides | None = None
    ) -> CountedSite:
        """With the first formula that equals the count."""
        sides = sides or self.candidates.sides(site)
        for formula in candidates:
            if formula.macs_of(self.batch, *self._size) == macs:
                return CountedSite(site.name, formula.kind, site.describe(), macs, formula, site, sides)
        why = "no formula equals the count of its operations, which stands instead"
        return CountedSite(site.name, site.kind, site.describe(), macs, None, site, sides, why)


def _bounds(site: Site) -> tuple[list[Node], Node, list[Node]]:
    """Where a site begins, its last node, and what else belongs to it."""
    if isinstance(site, AttentionSite):
        nodes = site.nodes
        after = [nodes.output.node, *nodes.linears]
        end = nodes.out_proj if nodes.out_proj is not None else max(after)
        sources = [node for node in (nodes.source,) if node is not None]
        return sources, end, [node for node in nodes.linears if node is not None]
    if isinstance(site, MlpSite):
        return [site.source], site.second, []
    return [site.source], site.result, []
