"""Sites where a part of the tokens query are lifted as that; learned queries are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from group_donors import difference
from query_donors import query_donor, query_images
from repetition import thinned

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.ir.sites import AttentionSite, Global

# name: (how many of how many tokens query) of every site that reads out
PARTIAL = {"cait": [(1, 17)] * 2, "crossvit": [(1, 197), (1, 401)], "two queries": [(2, 18)]}
POOLING = ("siglip", "pooling, expanded", "pooling, repeated")


@pytest.mark.parametrize("name", PARTIAL)
def test_querying_tokens_are_read(name: str) -> None:
    plan = attnrewrite.plan(query_donor(name), "identity", query_images(name))
    sites = [p.site for p in plan.sites if isinstance(p.site, AttentionSite) and p.site.queries is not None]
    found = [(len(site.queries), site.source_tokens) for site in sites if site.queries is not None]
    assert found == PARTIAL[name]
    assert all(torch.equal(site.queries, torch.arange(len(site.queries))) for site in sites if site.queries is not None)
    assert all(isinstance(site.keys, Global) and site.output is not None for site in sites)
    assert all(f"queries {count} of {tokens} keys global" in str(plan) for count, tokens in found)


@pytest.mark.parametrize("name", thinned([*PARTIAL, *POOLING], 3))
def test_the_function_is_kept_at_another_batch(name: str) -> None:
    converted = attnrewrite.convert(query_donor(name), "identity", query_images(name), progress=False)
    batch = query_images(name, 3)
    with torch.no_grad():
        assert difference(converted(batch), query_donor(name)(batch)) <= 1e-12
    rows = attnrewrite.report(converted).sites
    kept = [row for row in rows if row.kind == "attention" and "queries" in row.source and row.status == "converted"]
    assert len(kept) == len(PARTIAL.get(name, []))


@pytest.mark.parametrize("name", POOLING)
def test_learned_queries_are_refused_by_name_and_their_mlp_is_converted(name: str) -> None:
    converted = attnrewrite.convert(query_donor(name), "identity", query_images(name), progress=False)
    rows = attnrewrite.report(converted).sites
    refused = [row.why for row in rows if row.kind == "attention" and row.status == "refused"]
    assert len(refused) == 1
    assert refused[0].startswith("its queries are learned parameters (attention pooling)")
    assert {row.status for row in rows if row.kind == "mlp"} == {"converted"}


@pytest.mark.parametrize(
    "target", ["neighborhood", "dilated_neighborhood", "aggregated", "manhattan", "manhattan_decomposed",
               "long_short_distance"],
)  # fmt: skip
@pytest.mark.parametrize("official", [False, True])
def test_other_targets_refuse_a_read_out(target: str, official: bool) -> None:
    with pytest.raises(ConversionError, match="only 2 of its 18 tokens query: it is a readout"):
        attnrewrite.convert(
            query_donor("two queries"), target, query_images("two queries"), official=official, fidelity="fresh"
        )


def test_costs_are_counted_to_the_integer() -> None:
    for name in ("cait", "two queries"):
        found = attnrewrite.analyze(query_donor(name), query_images(name))
        assert all(check.equal for check in found.checks if check.height % 16 == check.width % 16 == 0)
        assert [site.kind for site in found.sites if "queries" in site.describe] == ["XA"] * len(PARTIAL[name])
