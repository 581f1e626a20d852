"""The report: measured errors and masses, JSON, Markdown and text."""

from __future__ import annotations

import json
import re

import pytest
import torch
from model_queries import ATTENTION
from small_models import small_model

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError
from attnrewrite.reports.conversion import ConversionReport, SiteReport


def test_the_report_measures_lossy_conversions(projected):
    report = attnrewrite.report(projected)
    assert report.output_error > 1e-6
    for site in report.converted:
        assert site.exactness == "PROJECTED"
        assert site.error > 1e-6
        assert len(site.dropped_mass) == 3
        assert all(0.0 < mass < 1.0 for mass in site.dropped_mass)
        assert "certified" in site.certificate
        assert "kernel 3" in site.why


def test_the_dropped_mass_is_that_of_the_softmax(vit, batch):
    """Against the attention weights of the original, in which all heads see 16 tokens and the class token."""
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=1, sites="blocks.0.attn")
    attention = vit.blocks[0].attn
    with torch.no_grad():
        tokens = vit.blocks[0].norm1(vit.norm_pre(vit._pos_embed(vit.patch_embed(batch))))
        query, key, _ = attention.qkv(tokens).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / 4).softmax(-1)
    seen = torch.eye(17, dtype=torch.bool)
    seen[0, :] = seen[:, 0] = True
    expected = (weights * ~seen).sum(-1).mean((0, 2))
    found = torch.tensor(attnrewrite.report(converted).converted[0].dropped_mass, dtype=torch.float64)
    assert float((found - expected).abs().max()) < 1e-5


def test_the_local_error_is_that_of_the_core(vit, batch):
    """A kernel that covers the map loses nothing; smaller ones lose more and more."""
    errors = []
    for kernel in (3, 1):
        converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=kernel, sites="blocks.0.attn")
        errors.append(attnrewrite.report(converted).converted[0].error)
    assert 0 < errors[0] < errors[1]


def test_what_was_not_measured_is_never_zero(exact):
    report = attnrewrite.report(exact)
    assert all(site.error is None for site in report.converted)
    assert "not measured" in str(report)
    assert "| not measured |" in report.to_markdown()
    assert all(site["error"] is None for site in json.loads(report.to_json())["sites"])
    plain = ConversionReport("Model", [[1, 3, 8, 8]], [SiteReport("a.0.attn", "attention", "", "converted")])
    assert "output error not measured" in plain.headline()
    assert json.loads(plain.to_json())["output_error"] is None


def test_the_json_has_a_schema_version_and_the_sites(projected):
    data = json.loads(attnrewrite.report(projected).to_json())
    assert data["schema_version"] == 3
    assert data["model"] == "VisionTransformer"
    assert data["input_shapes"] == [[2, 3, 64, 64]]
    rows = {site["name"]: site for site in data["sites"]}
    assert rows["blocks.0.attn"]["settings"] == {"kernel_size": [3, 3], "dilation": [1, 1]}
    assert rows["blocks.0.mlp"]["status"] == "untouched"


def test_json_holds_no_nan():
    report = ConversionReport("Model", [], [SiteReport("a", "attention", "", "converted", error=float("nan"))])
    json.loads(report.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_alike_sites_share_a_row(exact):
    """The last attention is not like the others: its map is read by nothing."""
    markdown = attnrewrite.report(exact).to_markdown()
    assert "| blocks.{0...1}.mlp |" in markdown
    assert "blocks.1.mlp" not in markdown
    assert "blocks.{0...1}.mlp" in str(attnrewrite.report(exact))
    assert "| blocks.1.attn | converted | EXACT DEAD |" in markdown


def test_folding_does_not_claim_sites_between_that_differ(batch):
    """blocks.0 and blocks.2 are not ``blocks.{0...2}`` if blocks.1 is another row."""
    converted = attnrewrite.convert(
        small_model("timm_vit", depth=3), "neighborhood", batch, kernel_size=3, keep="blocks.1.attn"
    )
    markdown = attnrewrite.report(converted).to_markdown()
    assert "{0...2}.attn" not in markdown
    for name in (*ATTENTION, "blocks.2.attn"):
        assert f"| {name} |" in markdown


def test_a_folded_row_shows_the_largest_error():
    sites = [
        SiteReport(f"blocks.{index}.attn", "attention", "s", "converted", "t", "PROJECTED", error=error)
        for index, error in enumerate([0.1, 0.3, 0.2])
    ]
    assert "3.0e-01" in ConversionReport("Model", [], sites).to_markdown()


def test_a_folded_row_does_not_hide_what_was_not_measured_or_is_nan():
    sites = [
        SiteReport(f"blocks.{index}.attn", "attention", "s", "converted", "t", "PROJECTED", error=error)
        for index, error in enumerate([0.1, float("nan"), 0.2])
    ]
    assert "nan" in ConversionReport("Model", [], sites).to_markdown()


def test_markdown_is_a_table_with_one_width(projected):
    rows = [line for line in attnrewrite.report(projected).to_markdown().splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "2 of" not in rows[0]


def test_text_with_brackets_is_not_taken_for_markup():
    site = SiteReport("a", "attention", "keys [bold]x[/bold]", "refused", why="its arguments[0] [/] differ")
    text = str(ConversionReport("Model", [], [site]))
    assert "[bold]x[/bold]" in text
    assert "arguments[0]" in text


def test_a_class_that_is_none_is_named_and_the_nearest_suggested():
    report = ConversionReport("Model", [], [SiteReport("a", "attention", "", "converted", "t", "PROJECTED")])
    known = "below: expected one of fresh, projected, continuous, exact, got 'exactt'; did you mean 'exact'?"
    with pytest.raises(ArgumentError, match=re.escape(known)):
        report.raise_if(below="exactt")
    with pytest.raises(ConversionError, match="a: PROJECTED"):
        report.raise_if(below="continuous")
    report.raise_if(below="projected")


def test_no_name_is_taken_for_markup_in_a_page():
    site = SiteReport("a", "attention", "<i>keys</i>", "refused", why='its "<script>" & more')
    page = ConversionReport("<b>Model</b>", [], [site]).to_html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "its &#34;&lt;script&gt;&#34; &amp; more" in page


def test_bars_in_a_cell_do_not_split_it():
    rows = ConversionReport("Model", [], [SiteReport("a", "attention", "x|y", "refused")]).to_markdown().splitlines()
    assert rows[-1].split(" | ")[2] == r"x\|y"


def test_the_headline_counts(projected):
    assert "2 of 5 sites converted; output error" in attnrewrite.report(projected).headline()


def test_no_new_parameters_are_claimed_and_none_exist(projected, vit):
    assert attnrewrite.report(projected).new_parameters == []
    assert len(list(projected.parameters())) == len(list(vit.parameters()))


def test_products_are_counted_before_and_after(vit, batch):
    """Per image and head: queries times keys times both widths; 16 map tokens and a class token, 3 heads of 16."""
    plan = attnrewrite.plan(vit, "neighborhood", batch, kernel_size=3)
    images, heads, widths = len(batch), 3, 2 * 16
    dense = images * heads * 17 * 17 * widths
    sliding = images * heads * (16 * (9 + 1) + 17) * widths  # the class token still sees everything
    assert {site.macs for site in plan.report().sites if site.kind == "attention"} == {(dense, sliding)}
