"""The formulas that a site may have, by what it is and the maps it stands on. None is believed before it is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from sympy import Expr, Integer
from torch.fx import Node

from ...algebra import formulas
from ...algebra.site_formula import SiteFormula, Widths
from ...graph.values import input_of, operator_name, shape_of
from ...ir.sites import AttentionSite, Global, Grid, MapGroups, MlpSite, Reduced, StemSite, Window
from ...operators import GroupedProblem
from .counted_site import AnySite
from .extents import Maps, Sides
from .operator_sites import OperatorSite


class Candidates:
    """Sizes of one captured graph, restated at any image size, put into the formulas of building blocks.

    Args:
        maps: of the graph.
        prefixes: the numbers of prefix tokens that stand before a map's cells in its sequences.
        batch: images of the captured call.
    """

    def __init__(self, maps: Maps, prefixes: tuple[int, ...], batch: int) -> None:
        self._maps, self._prefixes, self._batch = maps, prefixes, batch

    def of(self, site: AnySite) -> Iterator[SiteFormula]:
        """The likelier first."""
        match site:
            case AttentionSite():
                yield from self._attention(site)
            case OperatorSite():
                yield from self._operator(site)
            case MlpSite():
                yield from self._mlp(site)
            case StemSite():
                sides = self.sides(site)
                if sides is not None:
                    yield formulas.patch_embedding(*sides, site.in_channels, site.out_channels, site.kernel)

    def of_node(self, node: Node) -> SiteFormula | None:
        """Of a linear map or convolution on its own."""
        match operator_name(node):
            case "aten::linear":
                return self._linear(node)
            case "aten::conv2d":
                return self._convolution(node)
        return None

    def sides(self, site: AnySite) -> Sides | None:
        """Of the map that a site stands on; a stem's is the one it makes."""
        match site:
            case AttentionSite() if site.grid is not None:
                return self._maps.sides((site.grid.height, site.grid.width), site.nodes.product)
            case OperatorSite():
                return self._maps.sides(site.size, site.node)
            case StemSite():
                cells = site.result.meta["val"].numel() // self._batch // site.out_channels
                return self._maps.of_cells(cells, _after(site.result))
        return None

    def tokens(self, count: int, before: Node) -> Expr | None:
        """A number of tokens at capture, at any size."""
        return self._maps.tokens(count, before, self._prefixes)

    def _attention(self, site: AttentionSite) -> Iterator[SiteFormula]:
        widths = Widths(shape_of(site.source)[-1], site.heads, site.heads * site.head_dim)
        product = site.nodes.product
        if isinstance(site.keys, MapGroups) and (sides := self.sides(site)):
            yield _of_groups(site.keys, site.map_grid, sides, widths)
        own = site.queries  # class tokens, whose number does not grow with the image
        queries = self.tokens(_axis(site, "query", "x"), product) if own is None else Integer(len(own))
        if queries is None:
            return
        if isinstance(site.keys, Global):
            yield formulas.self_attention(queries, widths)
        if isinstance(site.keys, Reduced):
            yield from self._reduced(site, site.keys, queries, widths)
        keys = self.tokens(_axis(site, "key", "y"), product)
        if keys is not None:
            key_source = site.nodes.key_source or site.source
            yield formulas.cross_attention(queries, keys, shape_of(key_source)[-1], widths)

    def _reduced(self, site: AttentionSite, keys: Reduced, queries: Expr, widths: Widths) -> Iterator[SiteFormula]:
        """Reduced by a strided convolution, by pooling before a 1x1 convolution, or by pooling alone."""
        sides = self._maps.sides((keys.height, keys.width), site.nodes.product, fixed=True)
        if sides is None or site.grid is None:
            return
        ratio = site.grid.height // keys.height
        cells = sides[0] * sides[1]
        for kernel, convolved in ((ratio, True), (1, True), (1, False)):
            yield formulas.reduced_attention(queries, cells, kernel, convolved, widths)

    def _operator(self, site: OperatorSite) -> Iterator[SiteFormula]:
        sides = self.sides(site)
        if sides is None:
            return
        problem = site.problem
        _batch, heads, head_dim, _value_dim = problem.sizes
        widths = Widths(site.width, heads, heads * head_dim)
        if isinstance(problem, GroupedProblem):
            window = Window(_pair(problem.window_size), _pair(problem.shift), problem.pad_key is not None)
            yield formulas.block_attention(*sides, window, widths)
        else:
            kernel, dilation = _pair(problem.kernel_size), _pair(problem.dilation)
            yield formulas.neighborhood_attention(*sides, site.prefix_tokens, kernel, dilation, widths)

    def _mlp(self, site: MlpSite) -> Iterator[SiteFormula]:
        tokens = self._rows(site.source, site.second)
        if tokens is None:
            return
        gated, kernel = mlp_form(site)
        out = shape_of(site.second)[-1]
        yield formulas.mlp(tokens, site.width, site.hidden_width, out, gated=gated, depthwise=kernel)

    def _linear(self, node: Node) -> SiteFormula | None:
        operand = input_of(node)
        tokens = self._rows(operand, node)
        return None if tokens is None else formulas.linear(tokens, shape_of(operand)[-1], shape_of(node)[-1])

    def _rows(self, value: Node, before: Node) -> Expr | None:
        """How many rows of channels a value has per image, at any size."""
        shape = shape_of(value)
        return self.tokens(math.prod(shape) // shape[-1] // self._batch, before)

    def _convolution(self, node: Node) -> SiteFormula | None:
        cells, weight = math.prod(shape_of(node)[2:]), shape_of(input_of(node, 1))
        sides = self._maps.of_cells(cells, _after(node)) or self._maps.of_cells(cells, _after(node), fixed=True)
        if sides is None or len(weight) != 4:
            return None
        return replace(formulas.patch_embedding(*sides, weight[1], weight[0], (weight[2], weight[3])), kind="conv")


def mlp_form(site: MlpSite) -> tuple[bool, int]:
    """Whether it has a gate, and the side of its convolution (0 for none)."""
    kernels = [shape_of(s.call.args[1])[-1] for s in site.stages if s.kind == "convolution"]  # type: ignore[arg-type]  # a node
    return any(stage.kind == "gate" for stage in site.stages), kernels[0] if len(kernels) == 1 else 0


def _of_groups(groups: MapGroups, grid: Grid, sides: Sides, widths: Widths) -> SiteFormula:
    if isinstance(groups, Window):
        return formulas.window_attention(*sides, groups.size, widths)
    return formulas.interleaved_attention(*sides, groups, widths, one_region=groups.is_one_region(grid))


def _after(node: Node) -> Node:
    """What is made by ``node`` itself counts as made before it."""
    return node.next


def _axis(site: AttentionSite, operand: str, axis: str) -> int:
    """The length of an operand's axis at capture, by its name."""
    part = getattr(site.nodes, operand)
    return shape_of(part.node)[part.axes.index(axis)]


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = values
    return rows, columns
