"""An attention in three comparisons, each from given values to the next: operands, their attention, the projection.

Softmax hides a key's bias, and a window that covers its map the order of its tokens; operands hide nothing. Operands
and projection are compared on all tokens of random values, and on a sample of the captured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.dataflow import Dataflow
from ..graph.values import Values, cast, evaluate, input_of, shape_of
from ..ir.sites import AttentionSite, Operand
from ..lift.projections import group_sizes
from ..numerics.error import relative_error, worst
from . import forms
from .ends import compared_of, inputs_of, operands_of
from .gaussian import gaussian
from .placing import heads_of_groups, hidden_keys, in_groups, misplaced, result_rows
from .query_rows import SAMPLE, QueryRows, captured_mixture, cut, extents, sample_of, sampled_rows

_TELLING = 2**16
"""Elements that tell by which number an operand was multiplied: it is one for all of them."""


@dataclass(frozen=True)
class AttentionCheck:
    """The comparisons of one site. ``rows`` are the queries that are looked at, None for all."""

    site: AttentionSite
    flow: Dataflow

    @cached_property
    def rows(self) -> QueryRows | None:
        return sampled_rows(self.site, self.flow)

    @cached_property
    def misplaced(self) -> str:
        return misplaced(self.site)

    @property
    def sampled(self) -> str:
        """What the certificate says of the queries that are looked at."""
        return "" if self.rows is None else str(self.rows)

    @property
    def work(self) -> float:
        """Multiplications in the site's linear maps, for its tokens, and in the products that are looked at."""
        nodes = self.site.nodes
        linears = {node for node in (*nodes.linears, nodes.out_proj) if node is not None}
        sizes = ((self.flow.constants[input_of(node, 1)].numel(), shape_of(node)) for node in linears)
        queries, keys = extents(self.site)
        seen = queries if self.rows is None else len(self.rows.places)
        widths = sum(
            shape_of(part.node)[part.axes.index(axis)] for part, axis in ((nodes.key, "d"), (nodes.value, "e"))
        )
        products = math.prod(group_sizes(nodes)) * seen * keys * widths
        return sum(weights * math.prod(shape[:-1]) for weights, shape in sizes) + products

    def random_error(self, dtype: torch.dtype) -> float:
        """On Gaussian values, in ``dtype``: of the sources, and of what is projected in the end."""
        site, output = self.site, self.site.nodes.output.node
        values = gaussian(inputs_of(self.site), dtype)
        values |= self._evaluated(operands_of(site), values, dtype)
        mixture = captured_mixture(site, self.flow, self._only_operands(values), self.rows, dtype)
        errors = [self._operand_error(values, None, None), self._mixture_error(values, mixture)]
        if site.nodes.out_proj is not None:
            drawn = gaussian([output], dtype)
            result = self._evaluated([site.result], drawn, dtype)[site.result]
            errors.append(self._merge_error(drawn[output], result, None))
        return worst(*errors)

    def captured_error(self, captured: Values, dtype: torch.dtype) -> float:
        """In ``dtype`` on the values that the example input gave.

        Its projections, which are certified on all tokens of the random values, are looked at on a sample of them here.
        What the model computed is compared with as it is, unless it is to be compared in another dtype: then it is
        computed anew from the captured sources and the captured output.
        """
        site, output = self.site, self.site.nodes.output
        values = {node: cast(captured[node], dtype) for node in inputs_of(site)}
        anew = dtype == torch.float64 or any(captured[node].dtype != dtype for node in compared_of(site))
        operands = operands_of(site)
        values |= self._evaluated(operands, values, dtype) if anew else {node: captured[node] for node in operands}
        if anew:
            mixture = captured_mixture(site, self.flow, self._only_operands(values), self.rows, dtype)
        else:
            mixture = cut(captured[output.node], output.axes.index("x"), self.rows)
        places, keys = (sample_of(count) if count > SAMPLE else None for count in extents(site))
        errors = [self._operand_error(values, places, keys), self._mixture_error(values, mixture)]
        if site.nodes.out_proj is not None:
            mixed = cast(captured[output.node], dtype)
            result = self._evaluated([site.result], {output.node: mixed}, dtype) if anew else captured
            errors.append(self._merge_error(mixed, result[site.result], places))
        return worst(*errors)

    @property
    def _operands(self) -> tuple[Operand, Operand, Operand]:
        nodes = self.site.nodes
        return nodes.query, nodes.key, nodes.value

    def _only_operands(self, values: Values) -> Values:
        return {node: values[node] for node in operands_of(self.site)}

    def _evaluated(self, targets: list[Node], given: Values, dtype: torch.dtype) -> Values:
        values = evaluate(targets, given, self.flow.capture, self.flow.constants, dtype)
        return {node: values[node] for node in targets}

    def _weights(self, like: Tensor) -> Callable[[Node], Tensor]:
        return lambda node: cast(self.flow.constants[node], like.dtype)

    def _operand_error(self, values: Values, queries: Tensor | None, keys: Tensor | None) -> float:
        """Projections of the sources beside the operands, at places on the axes of queries and keys (None: all).

        What scales queries and keys on their way to the product must be what the site's scale holds beside that of the
        product; how it is shared out is not said.
        """
        site, placement = self.site, self.site.nodes.placement
        shared = site.scale / site.scale_of_operands
        if placement is None:
            return abs(shared - 1.0)
        parts = (
            (site.source, site.nodes.query, site.query, site.query_norm, placement.queries, queries),
            (site.nodes.key_source or site.source, site.nodes.key, site.key, site.key_norm, placement.keys, keys),
            (site.nodes.key_source or site.source, site.nodes.value, site.value, None, placement.keys, keys),
        )
        errors, factors = [], []
        for source, operand, projection, norm, tokens, places in parts:  # one at a time: each is as large as its source
            assert projection is not None
            given, token = _tokens(values[source], _at(tokens, places))
            weights = self._weights(given)
            lifted = forms.normalized(forms.project(given, projection, weights), norm, weights)
            lifted = lifted[token, placement.heads[:, None]]
            expected = _at(in_groups(values[operand.node], operand, site.nodes), places)
            factors.append(_factor(lifted, expected) if operand is not site.nodes.value else 1.0)
            errors.append(relative_error(lifted * factors[-1], expected))
        scale = factors[0] * factors[1]
        return worst(*errors, abs(scale / shared - 1.0) if scale != 0.0 else 0.0)

    def _mixture_error(self, values: Values, mixture: Tensor) -> float:
        """The attention of given operands beside that of the captured graph, at the queries that are looked at."""
        site, nodes = self.site, self.site.nodes
        query, key, value = (in_groups(values[operand.node], operand, nodes) for operand in self._operands)
        places = None if self.rows is None else self.rows.places
        scores_of = forms.ScoresOf(heads_of_groups(site), places, hidden_keys(site, places))
        actual = forms.attend(site, _at(query, places), key, value, self._weights(query), scores_of)
        expected = in_groups(mixture, nodes.output, nodes)
        if nodes.placement is None:
            return relative_error(actual, expected)
        asks = _at(nodes.placement.queries, places) >= 0
        return relative_error(actual[asks], expected[asks])

    def _merge_error(self, mixed: Tensor, result: Tensor, places: Tensor | None) -> float:
        """The output projection of a given mixture beside the captured result, of the tokens at ``places``."""
        site, placement = self.site, self.site.nodes.placement
        assert placement is not None
        mixture, rows = _at(in_groups(mixed, site.nodes.output, site.nodes), places), _at(result_rows(site), places)
        expected = result.flatten(0, -2)
        if places is not None:
            seen, rows = rows.unique(return_inverse=True)
            rows, expected = rows - int(seen[0] < 0), expected[seen[seen >= 0]]
        mixed_heads = mixture.new_zeros(len(expected) + 1, site.heads, mixture.shape[-1])
        mixed_heads[rows, placement.heads[:, None]] = mixture  # what padded slots attend to is written to the last row
        return relative_error(forms.merge(site, mixed_heads[:-1], self._weights(mixed_heads)), expected)


def _tokens(value: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of ``value`` at the flat positions ``wanted``, each once (-1: zeros), and where each of them is."""
    seen, where = wanted.unique(return_inverse=True)
    rows = value.flatten(0, -2)
    if len(seen) == len(rows) and int(seen[0]) == 0:
        return rows, where
    return torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])[seen], where


def _at(value: Tensor, places: Tensor | None) -> Tensor:
    """``value`` at some places of its second axis; all of it without ``places``."""
    return value if places is None else value[:, places]


def _factor(part: Tensor, known: Tensor) -> float:
    """The number that ``part`` must be multiplied with to come nearest to ``known``, told by some of its elements; zero
    where nothing tells it, for they are all zero."""
    step = -(-part.numel() // _TELLING)
    part, known = (value.flatten()[::step].double() for value in (part, known))
    total = float(part @ part)
    return float(part @ known) / total if total != 0.0 else 0.0


__all__ = ["AttentionCheck"]
