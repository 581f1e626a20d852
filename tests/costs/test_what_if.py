"""What ``analyze(model, to=...)`` says a conversion would cost, against the conversion itself, to the integer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from repetition import thinned
from torch import nn

from attnrewrite import analyze, convert
from attnrewrite.algebra.core_formula import CoreSizes
from attnrewrite.algebra.site_formula import ZERO, C, N, SiteFormula, h
from attnrewrite.costs import Report
from attnrewrite.costs.count.size_tracer import SizeTracer
from attnrewrite.costs.report.what_if import converted_cost
from attnrewrite.errors import ArgumentError, ConversionError
from attnrewrite.hosts.loading import load_model
from attnrewrite.ir.contract import BetweenProjections, Exactness, Target
from attnrewrite.ir.core import AttentionCore
from attnrewrite.planning.registry import known_targets, target_of

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
SWIN = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 5}
PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32), "num_heads": (1, 2, 2, 2), "num_classes": 5}
DONORS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("timm:vit_tiny_patch16_224", {**VIT, "img_size": (64, 96), "dynamic_img_size": True}, (64, 96)),
    "vit, pooled": (
        "timm:vit_tiny_patch16_224",
        {**VIT, "img_size": (64, 96), "embed_dim": 32, "num_heads": 2, "class_token": False, "global_pool": "avg"},
        (64, 96),
    ),
    "swin": ("timm:swin_tiny_patch4_window7_224", {**SWIN, "img_size": (64, 64)}, (64, 64)),
    "swin, one window": ("timm:swin_tiny_patch4_window7_224", {**SWIN, "img_size": (32, 32)}, (32, 32)),
    "swin, padded": ("timm:swin_tiny_patch4_window7_224", {**SWIN, "img_size": (40, 56)}, (40, 56)),
    "pvt": ("timm:pvt_v2_b0", {**PVT, "mlp_ratios": (2, 2, 2, 2)}, (64, 64)),
}
OFF = float("-inf")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "aggregated": [{"pool": 1}, {"pool": (1, 2), "local_bias": 0.0}, {"window_size": 5, "local_bias": OFF}],
    "conv_glu": [{"hidden": "match"}],
    "long_short_distance": [{"group_size": 2}, {"group_size": (2, 3), "interval": 2}],
    "manhattan": [{"lce": False, "decay": 0.9, "reduced_keys": "keep"}],
    "manhattan_decomposed": [{"gate": True}],
    "neighborhood": [{"kernel_size": 3}, {"kernel_size": (3, 2), "dilation": 2}],
    "tokens_to_token": [{"mode": "exact"}, {"mode": "fresh", "kind": "performer", "fidelity": "fresh"}],
}
QUICK = {
    "neighborhood": "swin", "long_short_distance": "swin, padded", "rmt": "swin, one window", "transnext": "pvt",
}  # fmt: skip
"""Every run has these targets on these donors, the others on the ViT."""

PUBLISHED = {"official": True, "fidelity": "fresh"}
AS_PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("aggregated", {"pool": 2}), ("aggregated", {"pool": 1}), ("aggregated", {"pool_size": 2}),
    ("conv_glu", {}), ("conv_glu", {"hidden": "keep"}),
    ("cross_scale", {}), ("manhattan", {}), ("manhattan_decomposed", {}), ("neighborhood", {"kernel_size": 3}),
    ("tokens_to_token", {}),
]  # fmt: skip


def is_quick(name: str, target: str, options: dict[str, Any]) -> bool:
    """Each target plain on one donor, and with its last options on the ViT where that donor is another."""
    if name == "vit" and target in QUICK:
        return options in OPTIONS.get(target, [])[-1:]
    return name == QUICK.get(target, "vit") and not options


def cases() -> list[Any]:
    found = []
    for name in [name for name in DONORS if name != "vit, pooled"]:
        for target in sorted(known_targets()):
            for options in ({}, *OPTIONS.get(target, [])):
                marks = () if is_quick(name, target, options) else pytest.mark.slow
                found.append(pytest.param(name, target, options, id=f"{name} {target} {options}", marks=marks))
    published = [
        pytest.param("vit, pooled", target, PUBLISHED | own, id=f"vit, pooled {target} as published")
        for target, own in AS_PUBLISHED
    ]
    return found + thinned(published, 4)


@cache
def donor(name: str) -> nn.Module:
    torch.manual_seed(0)
    spec, options, _ = DONORS[name]
    return load_model(spec, **options).eval()


def image(name: str) -> torch.Tensor:
    return torch.randn(1, 3, *DONORS[name][2], generator=torch.Generator().manual_seed(0))


@cache
def report(name: str) -> Report:
    """Shared: only its formulas are asked for."""
    return analyze(donor(name), image(name))


@pytest.mark.parametrize(("name", "target", "options"), cases())
def test_a_conversion_costs_what_was_predicted(name, target, options):
    fidelity = {"fidelity": options["fidelity"]} if "fidelity" in options else {}
    own = {option: value for option, value in options.items() if option != "fidelity"}
    try:
        converted = convert(donor(name), target, image(name), progress=False, **own, **fidelity)
    except ConversionError:
        with pytest.raises(ConversionError, match="nothing to convert"):
            converted_cost(report(name), target, own, **fidelity)
        return
    predicted = converted_cost(report(name), target, own, **fidelity)
    counts = SizeTracer(converted, ((image(name),), {}))
    assert predicted.after_macs == counts.at_example().total.macs
    assert predicted.after_macs == sum(row.after_macs for row in predicted.rows)
    assert predicted.formula.macs(3, *counts.size) == counts.at(*counts.size, batch=3).total.macs
    twice = counts.at(2 * counts.size[0], 2 * counts.size[1])  # some conversions are tied to their size
    assert name != "vit" or twice is not None
    if twice is not None:
        assert predicted.formula.macs(1, 2 * counts.size[0], 2 * counts.size[1]) == twice.total.macs


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("neighborhood", {"NA"}), ("aggregated", {"AA"}), ("manhattan", {"MaSA"}), ("manhattan_decomposed", {"MaSA-d"}),
        ("long_short_distance", {"SDA"}), ("conv_glu", {"ConvGLU"}), ("cross_scale", {"CEL"}), ("t2t", {"T2T stem"}),
        ("transnext", {"AA", "ConvGLU"}), ("crossformer", {"SDA", "CEL"}), ("identity", {"SA", "MLP", "stem"}),
    ],
)  # fmt: skip
def test_sites_have_the_formula_of_what_they_become(target, kinds):
    rows = converted_cost(report("vit"), target, {}).rows
    assert {row.after.kind for row in rows if row.after.site in _sites(target)} == kinds
    assert all(row.after.formula is not None for row in rows)


def _sites(target: str) -> list[Any]:
    """Of the kinds that a target converts."""
    planned = report("vit").formula.lifted.sites
    kinds = {"transnext": ("attention", "mlp"), "crossformer": ("attention", "stem"), "t2t": ("stem",)}
    return [each.site for each in planned if each.site.kind in kinds.get(target, target_of(target).kinds)]


@pytest.mark.parametrize(
    "target",
    ["tokens_to_token", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aggregated", "crossformer", "rmt"))],
)
def test_converted_models_have_formulas_for_every_size(target):
    """The cores are found in the converted graph itself."""
    found = analyze(convert(donor("vit"), target, image("vit"), progress=False), image("vit"))
    assert found.assumptions == []
    assert all(check.equal for check in found.checks)
    assert {(check.height, check.width) for check in found.checks} != {(64, 96)}
    assert found.at(160, 240).macs == converted_cost(report("vit"), target, {}).formula.macs(1, 160, 240)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("neighbourhood", {}, "did you mean 'neighborhood'"),
        ("neighborhood", {"kernel": 3}, "does not take .'kernel'.; it takes: kernel_size"),
        ("aggregated", {"window_size": 4}, "must be odd"),
        (target_of("neighborhood"), {"kernel_size": 3}, "go into the target object"),
        ({"blocks.9.*": "neighborhood"}, {}, "matches no site"),
    ],
)
def test_errors_are_those_of_convert(to, options, message):
    for asked in (analyze, convert):
        keyword = {"progress": False} if asked is convert else {}
        with pytest.raises(ArgumentError, match=message):
            asked(donor("vit"), example_inputs=image("vit"), to=to, **options, **keyword)


def test_a_mapping_prices_each_site_by_its_own_target():
    to = {"blocks.0.*": target_of("neighborhood", {"kernel_size": 3}), "blocks.1.*": "manhattan_decomposed"}
    predicted = analyze(donor("vit"), image("vit"), to=to).comparison
    kinds = {row.name: row.after.kind for row in predicted.rows}
    assert (kinds["blocks.0.attn"], kinds["blocks.1.attn"]) == ("NA", "MaSA-d")
    assert predicted.after_macs == analyze(convert(donor("vit"), to, image("vit"), progress=False), image("vit")).total


def test_sites_that_stay_say_why():
    predicted = converted_cost(report("swin, one window"), "rmt", {})
    left = ["layers.0.blocks.0.attn is left as it is", "layers.0.blocks.1.attn is left as it is"]
    assert [note.partition(":")[0] for note in predicted.notes] == left
    with pytest.raises(ConversionError, match="FRESH is below fidelity"):
        analyze(donor("vit"), image("vit"), to="tokens_to_token", mode="fresh")


class Unheardof(AttentionCore):
    """A core that no table knows."""

    def forward(self, query, key, value):
        return torch.einsum("bnhd,bmhd,bmhe->bnhe", query[:, :, :, :4], key[:, :, :, :4], value)


class Strange(Target):
    name = "strange"

    def convert(self, site, index, weights):
        return BetweenProjections(Exactness.PROJECTED, "for a test", Unheardof())


def test_a_core_without_a_formula_is_counted_and_said_so():
    predicted = converted_cost(report("vit"), Strange(), {})
    assert [note for note in predicted.notes if "has no formula: its products are counted at 64x96 only" in note]
    tokens, width = 25, 24
    row = next(row for row in predicted.rows if row.name == "blocks.0.attn")
    changed = analyze(convert(donor("vit"), Strange(), image("vit"), progress=False), image("vit")).total
    assert predicted.after_macs == changed
    assert row.after_macs < row.before_macs == 4 * tokens * width**2 + 2 * tokens**2 * width


class Quarter(AttentionCore):
    """Scores four channels of each head, and says what that costs."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, query, key, value):
        return torch.einsum("bnmh,bmhe->bnhe", self.scores(query[..., :4], key[..., :4]), value)

    def scores(self, query, key):
        return torch.einsum("bnhd,bmhd->bnmh", query, key)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        values = {N: sizes.queries, **sizes.widths.symbols}
        return SiteFormula.of("quarter", values, dense=ZERO, core=N**2 * (4 * h + C))


class SummedQuarter(Quarter):
    """The same, with sums of products for scores, which no count of contractions sees."""

    counted_by_formula = True

    def scores(self, query, key):
        return (query[:, :, None] * key[:, None]).sum(-1)


@dataclass(frozen=True)
class Quartered(Target):
    core: type[Quarter] = Quarter
    name = "quartered"

    def convert(self, site, index, weights):
        return BetweenProjections(Exactness.PROJECTED, "for a test", self.core(site.grid))


@pytest.mark.parametrize("core", [Quarter, SummedQuarter])
def test_a_core_states_its_own_cost(core):
    predicted = converted_cost(report("vit"), Quartered(core), {})
    found = analyze(convert(donor("vit"), Quartered(core), image("vit"), progress=False), image("vit"))
    tokens, width, heads = 25, 24, 3
    row = next(row for row in predicted.rows if row.name == "blocks.0.attn")
    site = next(site for site in found.sites if site.name == "blocks.0.attn")
    assert row.after.kind == site.formula.kind == "quarter"
    assert row.after_macs == site.macs == 4 * tokens * width**2 + tokens**2 * (4 * heads + width)
    assert predicted.after_macs == found.total
    assert not [note for note in predicted.notes if "has no formula" in note]
    assert found.checks  # at other sizes than the captured one too
    assert all(check.equal for check in found.checks)
