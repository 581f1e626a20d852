"""The arguments that choose what is converted: sites, keep, fidelity and strict."""

from __future__ import annotations

import pytest
from attnrewrite.patterns.targets.neighborhood import Neighborhood
from model_queries import ATTENTION, converted_sites, fates, rewritten_names, run
from small_models import difference
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError


@pytest.mark.parametrize(
    "sites",
    ["blocks.1.*", ["blocks.1.attn"], {"*.1.a*"}, lambda site: ".1." in site.name],
    ids=["glob", "list", "set", "predicate"],
)
def test_sites_choose_what_is_converted(vit, batch, sites):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, sites=sites)
    assert converted_sites(converted) == rewritten_names(converted) == ["blocks.1.attn"]
    left = {s.name: s for s in attnrewrite.report(converted).sites}
    assert left["blocks.0.attn"].status == "kept"
    assert left["blocks.0.attn"].why == "not in sites"


@pytest.mark.parametrize(
    "keep",
    ["*.1.*", ["blocks.1.attn", "blocks.1.mlp"], lambda site: site.name.startswith("blocks.1.")],
    ids=["glob", "list", "predicate"],
)
def test_keep_chooses_what_is_left_alone(vit, batch, keep):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, keep=keep)
    assert converted_sites(converted) == ["blocks.0.attn"]
    assert {s.name: s.why for s in attnrewrite.report(converted).sites}["blocks.1.attn"] == "keep"


def test_keep_wins_over_sites(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, sites="*.attn", keep="blocks.0.*")
    assert converted_sites(converted) == ATTENTION[1:]


def test_a_predicate_is_given_the_site(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, sites=lambda site: site.kind == "mlp")
    assert {site.kind for site in attnrewrite.report(converted).converted} == {"mlp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": "blocks.9.attn"}, r"sites: 'blocks\.9\.attn' matches no site; did you mean 'blocks\.\d\.attn'"),
        ({"keep": ["blocks.0.attn", "layers.*"]}, r"keep: 'layers\.\*' matches no site"),
        ({"keep": "auto"}, r'budget: keep="auto" needs'),
        ({"sites": "auto"}, r'sites: "auto" is for keep'),
        ({"sites": 3}, r"sites: "),
        ({"keep": [3]}, r"keep: "),
        ({"fidelity": "exactly"}, r"fidelity: expected one of fresh, projected, continuous, exact, got 'exactly'"),
        ({"fidelity": 3}, r"fidelity: expected one of"),
        ({"max_rewrites": "two"}, r"max_rewrites: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_selections_without_meaning_are_refused(vit, batch, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(vit, "identity", batch, **arguments)


def test_no_sites_are_nothing_to_convert(vit, batch):
    with pytest.raises(ConversionError, match=r"(?s)nothing to convert.*not in sites"):
        attnrewrite.convert(vit, "identity", batch, sites=[])


def test_fidelity_exact_leaves_lossy_conversions_alone(vit, batch):
    plan = attnrewrite.plan(vit, {"blocks.0.attn": Neighborhood(3), "*": "identity"}, batch, fidelity="exact")
    assert fates(plan)["blocks.0.attn"] == "kept"
    assert fates(plan)["blocks.1.attn"] == "convert"
    (why,) = [planned.why for planned in plan.sites if planned.site.name == "blocks.0.attn"]
    assert "PROJECTED is below fidelity='exact'" in why
    assert difference(run(plan.apply(), batch), run(vit, batch)) < 1e-12


@pytest.mark.parametrize("fidelity", ["exact", "continuous"])
def test_nothing_above_the_fidelity_is_an_error(vit, batch, fidelity):
    with pytest.raises(ConversionError, match=rf"(?s)nothing to convert.*blocks\.0\.attn.*below fidelity='{fidelity}'"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, fidelity=fidelity)


@pytest.mark.parametrize("fidelity", ["projected", "fresh"])
def test_lower_fidelity_accepts_lossy_conversions(vit, batch, fidelity, projected):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, fidelity=fidelity)
    assert converted_sites(converted) == converted_sites(projected)


def test_strict_names_every_site_that_is_left(vit, batch):
    targets = {"blocks.0.attn": Neighborhood(3), "*": "identity"}
    with pytest.raises(ConversionError, match=r"(?s)strict: 1 sites of VisionTransformer.*blocks\.0\.attn: PROJECTED"):
        attnrewrite.convert(vit, targets, batch, fidelity="exact", strict=True)


def test_strict_does_not_mind_what_was_kept_on_request(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, keep="blocks.0.*", strict=True)
    assert not any(name.startswith("blocks.0") for name in converted_sites(converted))


def test_strict_leaves_the_model_untouched(model, batch):
    before = values_of(model)
    with pytest.raises(ConversionError, match="strict: 2 sites"):
        attnrewrite.convert(model, "neighborhood", batch, kernel_size=9, oversize="error", strict=True, inplace=True)
    assert_untouched(model, before)
