"""Attention in which a part of the tokens query: a class token that reads the others out, or learned queries that pool
them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import Refusal
from ...graph.dataflow import Dataflow
from ...graph.values import shape_of
from ...lift.mixture import Core
from ...lift.projections import Grouping, Projected
from ...lift.scores import LEARNED_QUERIES


def querying_tokens(query: Projected, grouped: Grouping) -> Tensor | None:
    """The tokens of a sample that query, in their order; None if all of them do in the order they have."""
    own = grouped.queries[0]
    return None if torch.equal(own, torch.arange(_tokens_of_sample(query, grouped))) else own


def token_ranks(
    query: Projected, grouped: Grouping, queries: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None]:
    """``(shape, ranks)`` of the results: ``[samples, queries]``, and for every token of the source its place among them
    (-1: it does not query). Of all tokens the source's own shape, and None."""
    shape = shape_of(query.source)[:-1]
    if queries is None or grouped.batch_axis:
        return shape, None
    samples, count = shape[0], _tokens_of_sample(query, grouped)
    ranks = torch.full((samples, count), -1)
    ranks[:, queries] = torch.arange(samples * len(queries)).view(samples, -1)
    return (samples, len(queries)), ranks.flatten()


def require_queries_of_tokens(core: Core, flow: Dataflow) -> None:
    """Raises:
    Refusal: the queries are computed from parameters alone.
    """
    if core.query.node in flow.constants:
        raise Refusal(LEARNED_QUERIES)


def _tokens_of_sample(query: Projected, grouped: Grouping) -> int:
    shape = shape_of(query.source)[:-1]
    return math.prod(shape) // shape[grouped.batch_axis]
