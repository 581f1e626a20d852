"""DEAD: what the graph says of tokens that no output reads, against gradients and against arbitrary values there."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from conversions import case_name, converted
from target_donors import attention_rows, donor, images, timm_vit
from torch import Tensor, nn

import attnrewrite
from attnrewrite.ir.contract import BetweenProjections, Conversion, Exactness, Target
from attnrewrite.ir.core import AttentionCore
from attnrewrite.planning.reading import read_tokens
from attnrewrite.planning.stages import lifted

SMALLER = {"kernel_size": 3}


class Hidden(nn.Module):
    """A ViT that hands out more than its logits."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.vit, self.part = timm_vit(img_size=(64, 96)), part
        self.aside = nn.Linear(24, 24)

    def forward(self, image: Tensor) -> object:
        tokens = self.vit.forward_features(image)
        logits = self.vit.forward_head(tokens)
        if self.part == "one patch":
            return logits, tokens[:, 3]
        if self.part == "pooled":
            return logits + tokens[:, 1:].mean()
        if self.part == "written in place":
            return logits.add_(1.0)
        if self.part == "a part written in place":
            tokens[:, 1:].add_(1.0)
            return self.vit.forward_head(tokens)
        if self.part == "product with several":
            return logits, tokens[:, None, :1] @ self.aside.weight.expand(1, 4, -1, -1)
        return {"logits": logits, "class": tokens[:, 0]}


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".attn")]


def read_of(model: nn.Module, batch: Tensor) -> list[str]:
    made = lifted(model, batch)
    flow = made.flow
    sites = [planned.site for planned in made.sites]
    return [read for site, read in zip(sites, read_tokens(flow, sites), strict=True) if site.kind == "attention"]


def gradient_rows(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Of every attention module: which rows of its output move the logits of this batch."""
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in attentions(model)]
    output = model(batch)
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    total = sum((part * torch.randn_like(part)).sum() for part in parts)
    gradients = torch.autograd.grad(total, seen)
    for handle in handles:
        handle.remove()
    return [gradient.abs().flatten(2).amax((0, 2)) > 0 for gradient in gradients]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", ["all", "prefix"]),
        ("vit, registers", ["all", "prefix"]),
        ("vit, torchvision", ["all", "prefix"]),
        ("vit, transformers", ["all", "prefix"]),
        ("vit, qk norm", ["all", "prefix"]),
        ("vit, average", ["all", "all"]),
        ("swin", ["all"] * 4),
        ("swin, padded", ["all"] * 4),
        ("pvt v2", ["all"] * 4),
    ],
)
def test_what_is_read(name: str, expected: list[str]) -> None:
    assert read_of(donor(name), images(name)) == expected


@pytest.mark.parametrize("name", ["vit", "vit, registers", "vit, average"])
def test_it_is_what_gradients_say(name: str) -> None:
    """Zero at every row of the map in dead sites, and nowhere else."""
    model, prefix = donor(name), donor(name).num_prefix_tokens
    reads = read_of(model, images(name))
    for read, rows in zip(reads, gradient_rows(model, images(name)), strict=True):
        assert bool(rows[prefix:].all()) == (read == "all")
        assert bool(rows[prefix:].any()) == (read == "all")
        assert bool(rows[0])  # the class token, or the first of the map


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("one patch", ["all", "all"]),
        ("pooled", ["all", "all"]),
        ("class token", ["all", "prefix"]),
        ("product with several", ["all", "prefix"]),
        ("written in place", ["all", "prefix"]),
        ("a part written in place", ["all", "all"]),  # no proof is tried
    ],
)
def test_every_output_counts(part: str, expected: list[str]) -> None:
    assert read_of(Hidden(part).eval(), torch.randn(2, 3, 64, 96)) == expected


def test_a_distilled_model_reads_both_its_tokens() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=3, num_classes=5
    ).eval()
    assert read_of(model, torch.randn(1, 3, 64, 64)) == ["all", "prefix"]


def test_a_branch_that_is_left_unused_is_read_by_nothing() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.other = timm_vit(img_size=(64, 96)), timm_vit(img_size=(64, 96))

        def forward(self, image: Tensor) -> Tensor:
            self.other(image)
            return self.vit(image)

    report = attnrewrite.plan(Aside().eval(), "neighborhood", torch.randn(1, 3, 64, 96), **SMALLER).report()
    aside = [row for row in report.sites if row.name.startswith("other")]
    assert all((row.read, row.dead) == ("none", True) for row in aside)
    assert [row.dead for row in report.sites if row.name.startswith("vit") and row.kind == "attention"] == [False, True]


LOSSY = [
    ("vit", "neighborhood", SMALLER),
    ("vit", "aggregated", {"pool": 2}),
    ("vit", "manhattan", {"decay": 0.8}),
    ("vit", "manhattan_decomposed", {}),
    ("vit, registers", "long_short_distance", {"group_size": 3}),
]


@pytest.mark.parametrize("case", LOSSY, ids=case_name)
def test_a_dead_site_changes_no_output(case: tuple) -> None:
    """To rounding; and the report, in every form, says that it is dead."""
    name, target, options = case
    only = attnrewrite.convert(donor(name), target, images(name), sites="blocks.1.attn", **options)
    batch = images(name, 3, seed=5)
    with torch.no_grad():
        assert float((only(batch) - donor(name)(batch)).abs().max()) <= 1e-13 * float(only(batch).abs().max())
    report = attnrewrite.report(converted(case))
    assert [row.dead for row in attention_rows(converted(case))] == [False, True]
    assert "PROJECTED DEAD" in str(report)
    assert "1 DEAD" in str(report)
    assert "| PROJECTED DEAD |" in report.to_markdown()
    assert "<td>PROJECTED DEAD</td>" in report.to_html()
    data = json.loads(report.to_json())
    assert data["schema_version"] == 3
    assert [row["read"] for row in data["sites"] if row["kind"] == "attention"] == ["all", "prefix"]


def test_plan_and_explain_say_so() -> None:
    told = "DEAD beyond its prefix tokens: no output reads its map"
    plan = attnrewrite.plan(donor("vit"), "neighborhood", images("vit"), **SMALLER)
    (line,) = [line for line in str(plan).splitlines() if told in line]
    assert "@ blocks.1.attn" in line
    explained = " ".join(" ".join(attnrewrite.explain(donor("vit"), images("vit")).details()).split())
    assert re.search(r"@ blocks\.1\.attn certified \S+ " + told, explained)
    assert explained.count(told) == 1


class Doubling(AttentionCore):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2.0 * torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value))
        ).transpose(1, 2)


class Doubled(Target):
    """A target that changes what prefix tokens attend to as well."""

    name = "doubled"

    def convert(self, site: object, index: int, weights: object) -> Conversion:
        return BetweenProjections(Exactness.PROJECTED, "twice", Doubling())


def test_a_target_that_changes_prefix_tokens_is_not_dead() -> None:
    rows = attention_rows(attnrewrite.convert(donor("vit"), Doubled(), images("vit")))
    assert [(row.read, row.dead) for row in rows] == [("all", False), ("prefix", False)]
