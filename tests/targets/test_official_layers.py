"""``official=True``: what the published layers take over from a donor, what they leave, and how they are reported."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from attnrewrite.patterns.targets.cross_scale import CrossScale
from conversions import converted
from site_donors import DONORS, new_cores, plan_of, rows_of
from target_donors import distance, donor, images, logits, timm_vit
from torch import nn

import attnrewrite
from attnrewrite.errors import ArgumentError
from attnrewrite.modules import AggregatedAttention, CosineAttention
from attnrewrite.planning.registry import target_of

AVERAGE = {"class_token": False, "global_pool": "avg", "embed_dim": 48}
DONORS |= {
    "vit, average, wide": (lambda: timm_vit(img_size=(96, 80), **AVERAGE), (96, 80)),
    "vit, average, any size": (lambda: timm_vit(img_size=(96, 80), dynamic_img_size=True, **AVERAGE), (96, 80)),
    "vit, average, scaled": (lambda: _scaled(timm_vit(img_size=(96, 80), **AVERAGE)), (96, 80)),
    "vit, average, no biases": (lambda: timm_vit(img_size=(96, 80), qkv_bias=False, **AVERAGE), (96, 80)),
}
OFFICIAL = {"official": True}


def _scaled(model):
    """Scores of another scale than the published one, which only the queries can take up."""
    for block in model.blocks:
        block.attn.scale, block.attn.fused_attn = 0.11, False
    return model


def published(name, target, **options):
    return converted((name, target, OFFICIAL | options), fidelity="fresh")


def silent_bias(model):
    """Position biases of zero, as they are without one."""
    for core in new_cores(model, "attention"):
        nn.init.zeros_(core.pos.pos3[2].weight)
        nn.init.zeros_(core.pos.pos3[2].bias)


def unrotated(model):
    for core in new_cores(model, "attention"):
        core.position.rotary = "none"


# Where a published layer has nothing of its own that acts, it computes what the target's plain form does, which has
# an oracle of its own.
PLAIN = [
    ("vit, average, wide", "dilated_neighborhood", {"kernel_size": 3, "dilation": 2}, {}, None),
    ("swin", "neighborhood", {"kernel_size": 3}, {}, None),
    ("vit, average, scaled", "manhattan", {"placement": "outside"}, {"decay": "official"}, unrotated),
    ("vit, average, wide", "manhattan_decomposed", {}, {"decay": "official"}, unrotated),
    ("vit, average, scaled", "long_short_distance", {"group_size": 3, "interval": 2}, {}, silent_bias),
    ("vit", "conv_glu", {"hidden": "match"}, {}, None),
]
SLOW_PLAIN = [
    ("vit, average, wide", "neighborhood", {"kernel_size": 3}, {}, None),
    ("vit, average, scaled", "neighborhood", {"kernel_size": 3}, {}, None),
    ("vit, average, no biases", "neighborhood", {"kernel_size": 3}, {}, None),
    ("swin", "neighborhood", {"kernel_size": 7}, {}, None),
    ("swin, transformers", "neighborhood", {"kernel_size": 3, "dilation": 2}, {}, None),
    ("vit, average, wide", "manhattan", {}, {"decay": "official", "lce": False}, unrotated),
    ("vit, average, wide", "long_short_distance", {"group_size": 3}, {}, silent_bias),
    ("pvt v2", "conv_glu", {"hidden": "match"}, {}, None),
    ("swin", "conv_glu", {"hidden": "match"}, {}, None),
]


@pytest.mark.parametrize(
    ("name", "target", "options", "plain", "change"),
    PLAIN + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_PLAIN],
    ids=[f"{case[0]} {case[1]}" for case in PLAIN + SLOW_PLAIN],
)
def test_it_computes_what_the_plain_target_does(name, target, options, plain, change):
    model = copy.deepcopy(published(name, target, **options))
    if change is not None:
        before = logits(model, images(name))
        change(model)
        assert distance(logits(model, images(name)), before) > 1e-6
    expected = logits(converted((name, target, options | plain)), images(name))
    assert distance(logits(model, images(name)), expected) < 1e-10
    assert distance(expected, logits(donor(name), images(name))) > 1e-4  # a refitted MLP comes as near as 4e-4


FAULTS = {
    "a flipped table": lambda core: core.rpb.data.copy_(core.rpb.flip(1, 2)),
    "a dropped bias": lambda core: core.qkv.bias.data.zero_(),
    "keys and values exchanged": lambda core: core.qkv.weight.data.copy_(
        torch.cat([core.qkv.weight.chunk(3)[part] for part in (0, 2, 1)])
    ),
    "heads in another order": lambda core: core.proj.weight.data.copy_(core.proj.weight.roll(8, 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(fault):
    model = copy.deepcopy(published("swin", "neighborhood", kernel_size=3))
    FAULTS[fault](new_cores(model, "attention")[0])
    expected = logits(converted(("swin", "neighborhood", {"kernel_size": 3})), images("swin"))
    assert distance(logits(model, images("swin")), expected) > 1e-5


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("vit, average, wide", "neighborhood", {"kernel_size": 7}),
        ("vit", "conv_glu", {"hidden": "keep"}),
        ("pvt v2, linear", "conv_glu", {"hidden": "keep"}),
        ("vit, swiglu", "conv_glu", {"hidden": "keep"}),
        ("vit, packed gate", "conv_glu", {}),
    ],
)
def test_it_keeps_the_function_where_it_can(name, target, options):
    model = published(name, target, **options)
    assert {row.exactness for row in attnrewrite.report(model).sites if row.target} == {"CONTINUOUS"}
    assert distance(logits(model, images(name)), logits(donor(name), images(name))) < 1e-10


def test_aggregated_projections_are_the_donors_by_head():
    """Cosine similarity leaves no way to compare outputs: the weights themselves."""
    for name, kind in (("vit", AggregatedAttention), ("vit, average", CosineAttention)):
        options = {"pool": 2} if kind is AggregatedAttention else {}
        core, own = new_cores(published(name, "aggregated", **options), "attention")[0], donor(name).blocks[0].attn
        assert type(core) is kind
        given = (core.qkv,) if kind is CosineAttention else (core.q, core.kv)
        for part in ("weight", "bias"):
            found = torch.cat([getattr(linear, part) for linear in given])
            assert torch.allclose(found, getattr(own.qkv, part), rtol=0, atol=1e-12)
            assert torch.equal(getattr(core.proj, part), getattr(own.proj, part))


def test_aggregated_takes_the_ratio_of_spatial_reduction_and_the_bias_of_windows():
    pyramid = published("pvt v2", "aggregated")
    assert [getattr(core, "sr_ratio", 1) for core in new_cores(pyramid, "attention")] == [(8, 8), (4, 4), (2, 2), 1]
    pooled = published("pvt v2, linear", "aggregated")
    assert {core.pool_size for core in new_cores(pooled, "attention")} == {(7, 7)}
    core = new_cores(published("swin", "aggregated", pool=2), "attention")[0]
    table = donor("swin").layers[0].blocks[0].attn.relative_position_bias_table  # query minus key, 7 x 7
    center = table.unflatten(0, (7, 7))[2:5, 2:5].flip(0, 1).permute(2, 0, 1).flatten(1)
    assert torch.equal(core.relative_pos_bias_local, center)


def test_class_tokens_are_carried_by_the_layer_that_has_a_place_for_them():
    model = published("vit, registers", "aggregated", pool=2)
    core, attend = new_cores(model, "attention")[0], model.blocks[0].attn
    tokens = torch.randn(2, 5 + 20, 24, dtype=torch.float64)
    image, prefix = core(tokens[:, 5:].unflatten(1, (4, 5)), tokens[:, :5])
    assert torch.equal(attend(tokens), torch.cat([prefix, image.flatten(1, 2)], 1))
    with torch.no_grad():
        louder, _ = core(tokens[:, 5:].unflatten(1, (4, 5)), 2 * tokens[:, :5])
    assert distance(louder, image) > 1e-3  # the map sees them


def test_the_published_stem_keeps_filters_norm_and_function():
    for name in ("swin", "swin, torchvision"):
        model = attnrewrite.convert(donor(name), CrossScale(official=True), images(name), sites=_first_stem(name))
        assert [row.exactness for row in rows_of(model, "stem")] == ["EXACT"]
        assert distance(logits(model, images(name)), logits(donor(name), images(name))) < 1e-12


def _first_stem(name):
    sites = [planned.site for planned in plan_of(name, "cross_scale").sites if planned.site.kind == "stem"]
    return sites[0].name


def test_the_published_merge_normalizes_every_token_by_itself():
    name = "swin"
    model, expected = published(name, "cross_scale"), copy.deepcopy(donor(name))
    merge = expected.layers[1].downsample
    own, before = merge.norm, logits(expected, images(name))

    def norm(patches):
        tokens = patches.unflatten(-1, (4, -1))
        alone = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=own.eps).flatten(-2)
        return alone * own.weight + own.bias

    merge.norm = _Calling(norm)
    assert distance(logits(model, images(name)), logits(expected, images(name))) < 1e-12
    assert distance(before, logits(expected, images(name))) > 1e-3


class _Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, value):
        return self.function(value)


@pytest.mark.parametrize(
    ("name", "target", "options", "exactness", "new"),
    [
        ("vit, average, wide", "neighborhood", {"kernel_size": 3}, "PROJECTED", 3 * 5 * 5),
        ("swin", "neighborhood", {"kernel_size": 3}, "PROJECTED", 0),
        ("vit, average, wide", "manhattan", {}, "PROJECTED", 48 * 26),
        ("vit, average, wide", "long_short_distance", {"group_size": 3}, "FRESH", 63),
        ("vit, average, wide", "aggregated", {"pool": 2}, "FRESH", 48 * (48 + 13) + 3 * (18 + 514) + 1536),
        ("vit", "conv_glu", {}, "PROJECTED", 64 * 25 + 64 * 10),
    ],
)  # fmt: skip
def test_what_is_new_is_counted_and_named(name, target, options, exactness, new):
    model = published(name, target, **options)
    row = next(row for row in attnrewrite.report(model).sites if row.target)
    own = {full for full, _ in donor(name).named_parameters()}
    added = sum(p.numel() for full, p in model.named_parameters() if full not in own)
    rows = [row for row in attnrewrite.report(model).sites if row.target]
    assert row.exactness == exactness
    assert row.parameters["new"] == new
    assert sum(r.parameters["moved"] + r.parameters["new"] for r in rows) == added
    assert ("untrained: " in row.why) == (exactness == "FRESH")


def test_untrained_layers_need_to_be_asked_for():
    plan = plan_of("vit, average, wide", "aggregated", official=True, pool=2)
    kept = [planned for planned in plan.sites if planned.site.kind == "attention"]
    assert {planned.status for planned in kept} == {"kept"}
    assert kept[0].why.startswith("FRESH is below fidelity='projected': as published, cosine similarity")
    assert "untrained: temperature, query_embedding" in kept[0].why


@pytest.mark.parametrize(
    ("name", "target", "options", "reason"),
    [
        ("vit", "neighborhood", {}, r"not support 1 class or register tokens; leave official out, which keeps them"),
        ("vit, qk norm", "aggregated", {"pool": 2}, r"live\(.*\) acts between its projections and its scores"),
        ("pvt v2", "long_short_distance", {}, r"a 16th of 8 channels, but needs at least two"),
        ("swin", "manhattan", {}, r"it attends within window\(4, padding keys\)"),
        ("swin", "dilated_neighborhood", {}, r"dilation is not defined over window\(4, padding keys\) keys"),
        ("vit, dropout", "conv_glu", {}, r"it applies dropout in training .*; set its dropout rate to 0, or leave"),
        ("vit, swiglu and norm", "conv_glu", {}, r"the published unit has no inner norm"),
        ("pvt v2", "cross_scale", {}, r"the published merge doubles the channels, but this one maps 8 to 12"),
    ],
)
def test_what_has_no_place_in_a_published_layer_is_refused(name, target, options, reason):
    plan = plan_of(name, target, fidelity="fresh", official=True, **options)
    refused = [planned.why for planned in plan.sites if planned.status == "refused"]
    assert any(re.search(reason, why) for why in refused), refused


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("aggregated", {"local_bias": 0.0}, r"local_bias: 0\.0 contradicts official=True"),
        ("manhattan", {"decay": 0.8}, r"decay: 0\.8 contradicts official=True"),
        ("manhattan", {"lce": False}, r"lce: False contradicts official=True"),
        ("manhattan", {"reduced_keys": "keep"}, r"reduced_keys: 'keep' contradicts official=True"),
        ("manhattan_decomposed", {"gate": True}, r"gate: True contradicts official=True"),
        ("long_short_distance", {"shifted": "keep"}, r"shifted: 'keep' contradicts official=True"),
        ("long_short_distance", {"interval": (2, 3)}, r"interval: \(2, 3\) contradicts official=True"),
        ("neighborhood", {"kernel_size": (3, 5)}, r"kernel_size: \(3, 5\) contradicts official=True"),
        ("neighborhood", {"dilation": (1, 2)}, r"dilation: \(1, 2\) contradicts official=True"),
        ("dilated_neighborhood", {"kernel_size": (3, 3)}, r"kernel_size: \(3, 3\) contradicts official=True"),
        ("tokens_to_token", {"mode": "exact"}, r"mode: 'exact' contradicts official=True"),
        ("rmt", {"decay": 0.9}, r"decay: 0\.9 contradicts official=True"),
        ("t2t", {"mode": "fit"}, r"mode: 'fit' contradicts official=True"),
    ],
)
def test_options_that_contradict_it_are_named(target, options, message):
    with pytest.raises(ArgumentError, match=message):
        target_of(target, options | OFFICIAL)


@pytest.mark.parametrize("target", ["aggregated", "neighborhood", "conv_glu", "cross_scale", "tokens_to_token", "nat"])
def test_it_is_true_or_false(target):
    with pytest.raises(ArgumentError, match="official: expected False or True, got 'yes'"):
        target_of(target, {"official": "yes"})


def test_another_ratio_than_the_sites_is_an_argument_error():
    with pytest.raises(ArgumentError, match=r"pool: 4 contradicts official=True at .*, whose sr_ratio of \(8, 8\)"):
        attnrewrite.plan(donor("pvt v2"), "aggregated", images("pvt v2"), official=True, pool=4)
