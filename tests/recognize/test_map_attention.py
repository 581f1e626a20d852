"""Attention whose projections are convolutions of kernel 1 is read, certified and rewritten like any other."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import timm
import torch
from map_models import (
    DIM,
    HEADS,
    PACKINGS,
    PRODUCTS,
    WIDTH,
    MapAttention,
    MapReduced,
    MapWindows,
    map_images,
    map_model,
)
from model_queries import weights_of
from neighborhood_oracle import neighborhood_mask
from repetition import thinned
from small_models import assert_same_gradients, difference, gradients
from torch import nn

import attnrewrite
from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import wanted_nodes
from attnrewrite.errors import ConversionError
from attnrewrite.ir.sites import AttentionSite, Global, Grid, Projection, Reduced, Tokens, Window
from attnrewrite.planning.stages import lifted

OPTIONS = {"aggregated": {"window_size": 3, "pool": 1}}
SPELLINGS = list(itertools.product(PACKINGS, PRODUCTS))


def attention_of(model, example):
    """The one attention site of a model."""
    plan = lifted(model, example)
    (site,) = [planned.site for planned in plan.sites if isinstance(planned.site, AttentionSite)]
    return site


UNPROJECTED = "query, key and value are not linear projections; compute them by linear maps of the tokens"


def reasons(model, example):
    return [refused.reason for refused in lifted(model, example).refused]


def replaced(report):
    return {site.kind: site for site in report.converted}["attention"]


@pytest.mark.parametrize(("packing", "product"), SPELLINGS)
def test_roles_are_read_from_every_spelling(packing, product):
    site = attention_of(map_model(packing=packing, product=product), map_images())
    assert (site.heads, site.head_dim, site.grid) == (HEADS, DIM, Grid(6, 10))
    assert isinstance(site.keys, Global)
    assert site.scale == pytest.approx(DIM**-0.5)
    channels = torch.arange(WIDTH).view(HEADS, DIM)
    starts = {"3hd": channels, "h3d": 3 * DIM * torch.arange(HEADS)[:, None] + torch.arange(DIM), "hd3": 3 * channels}
    assert torch.equal(site.query.rows, starts.get(packing, channels))
    assert torch.equal(site.output.rows, channels)


@pytest.mark.parametrize(("packing", "product"), thinned(SPELLINGS, 3))
def test_identity_keeps_the_function_at_another_batch_and_size(packing, product):
    donor = map_model(packing=packing, product=product, bias=packing != "hd3")
    converted = attnrewrite.convert(donor, "identity", map_images(1 + (product == "einsum")), progress=False)
    assert replaced(attnrewrite.report(converted)).exactness == "EXACT"
    for batch, size in ((3, (24, 40)), (2, (40, 24)), (1, (32, 48)), (2, (16, 60))):
        images = map_images(batch, size)
        assert difference(converted(images), donor(images)) < 1e-12


@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_float32_is_exact_to_its_precision(to):
    donor = map_model(dtype=torch.float32, packing="h3d", product="transposed")
    images, options = map_images(dtype=torch.float32), {} if to == "identity" else {"kernel_size": 11}
    converted = attnrewrite.convert(donor, to, images, progress=False, **options)
    assert replaced(attnrewrite.report(converted)).exactness == "EXACT"
    assert difference(converted(images), donor(images)) < 2e-5


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_convolutions_stay_alive_under_their_names(packing):
    donor = map_model(packing=packing)
    converted = attnrewrite.convert(donor, "neighborhood", map_images(), kernel_size=3, progress=False)
    assert list(weights_of(converted)) == list(donor.state_dict())
    seen = []
    for module in (*converted.mixer.inputs, converted.mixer.proj):
        assert isinstance(module, nn.Conv2d)
        module.register_forward_hook(lambda module, given, result: seen.append(module))
    converted(map_images())
    assert seen == [*converted.mixer.inputs, converted.mixer.proj]


@pytest.mark.parametrize("to", ["identity", "manhattan", "aggregated"])
def test_gradients_equal_the_originals(to):
    donor = map_model(product="transposed")
    converted = attnrewrite.convert(donor, to, map_images(), progress=False, **OPTIONS.get(to, {}))
    expected, found = gradients(donor, map_images()), gradients(converted, map_images())
    assert_same_gradients({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("product", ["fused", "transposed"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_kernel_smaller_than_the_map_is_masked_attention(product, normed):
    donor, images = map_model(product=product, normed=normed), map_images()
    converted, report = attnrewrite.convert(
        donor, "neighborhood", images, kernel_size=3, progress=False, return_report=True
    )
    assert replaced(report).exactness == "PROJECTED"
    assert replaced(report).error > 1e-3
    expected = copy.deepcopy(donor)
    expected.mixer.mask = neighborhood_mask(6, 10, 3, prefix=0)
    assert difference(converted(images), expected(images)) < 1e-12
    assert difference(converted(images), donor(images)) > 1e-4


def test_batch_norms_behind_the_convolutions_stay_in_the_graph():
    donor, images = map_model(packing="h3d", product="transposed", normed=True), map_images()
    site = attention_of(donor, images)
    assert site.qk == "live(batch_norm, mul)"
    assert site.grid == Grid(6, 10)
    converted = attnrewrite.convert(donor, "identity", images, progress=False)
    for training in (False, True):
        donor.train(training)
        converted.train(training)
        assert difference(converted(images), donor(images)) < 1e-12
    assert torch.equal(converted.mixer.norm.running_mean, donor.mixer.norm.running_mean)


@pytest.mark.parametrize("normed", [False, True])
def test_a_map_flattened_by_columns_has_no_neighborhoods(normed):
    donor, images = map_model(packing="h3d", normed=normed, turned=True), map_images()
    assert isinstance(attention_of(donor, images).keys, Tokens)
    converted = attnrewrite.convert(donor, "identity", images, progress=False)
    assert difference(converted(images), donor(images)) < 1e-12
    reason = "do not lie on a map" if normed else "not in the order of the tokens of their map"
    with pytest.raises(ConversionError, match=reason):
        attnrewrite.convert(donor, "neighborhood", images, kernel_size=3, progress=False)


def test_a_module_of_its_own_knows_the_map_that_it_is_given():
    torch.manual_seed(0)
    donor, x = MapAttention().double().eval(), torch.randn(2, WIDTH, 5, 7, dtype=torch.float64)
    assert attention_of(donor, x).grid == Grid(5, 7)
    converted = attnrewrite.convert(donor, "neighborhood", x, kernel_size=3, progress=False)
    expected = copy.deepcopy(donor)
    expected.mask = neighborhood_mask(5, 7, 3, prefix=0)
    assert difference(converted(x), expected(x)) < 1e-12


@pytest.mark.parametrize("packing", PACKINGS)
def test_sequences_with_channels_first_are_read_too(packing):
    donor, images = map_model(packing=packing, flat=True), map_images()
    assert attention_of(donor, images).grid == Grid(6, 10)
    converted = attnrewrite.convert(donor, "identity", images, progress=False)
    assert difference(converted(images), donor(images)) < 1e-12
    local = attnrewrite.convert(donor, "neighborhood", images, kernel_size=3, progress=False)
    masked = copy.deepcopy(donor)
    masked.mixer.mask = neighborhood_mask(6, 10, 3, prefix=0)
    assert difference(local(images), masked(images)) < 1e-12
    larger = map_images(size=(48, 32))
    assert difference(converted(larger), donor(larger)) < 1e-9


@pytest.mark.parametrize("to", ["identity", "neighborhood", "long_short_distance"])
def test_windows_of_a_map_are_neighborhoods_with_a_stride(to):
    donor, images = map_model(MapWindows()), map_images(size=(24, 36))
    assert attention_of(donor, images).keys == Window((3, 3))
    converted, report = attnrewrite.convert(donor, to, images, progress=False, return_report=True)
    assert replaced(report).exactness == "EXACT"
    assert list(weights_of(converted)) == list(donor.state_dict())
    calls = []
    converted.mixer.qkv.register_forward_hook(lambda module, given, result: calls.append(module))
    for size in ((24, 36), (48, 24)):
        assert difference(converted(map_images(3, size)), donor(map_images(3, size))) < 1e-12
    assert len(calls) == 2


@pytest.mark.parametrize("shared", [False, True])
def test_reduced_keys_between_convolutions_are_read(shared):
    donor, images = map_model(MapReduced(shared)), map_images()
    assert attention_of(donor, images).keys == Reduced(3, 5, "convolution stride 2")
    for to in ("identity", *(() if shared else ("aggregated",))):
        converted = attnrewrite.convert(donor, to, images, progress=False)
        for size in ((24, 40), (48, 32)):
            assert difference(converted(map_images(3, size)), donor(map_images(3, size))) < 1e-12


@pytest.mark.parametrize("to", ["manhattan", "neighborhood"])
def test_a_published_layer_takes_the_weights_of_the_convolutions(to):
    donor, images = map_model(packing="h3d"), map_images()
    options = {"kernel_size": 11} if to == "neighborhood" else {}
    converted, report = attnrewrite.convert(
        donor, to, images, official=True, progress=False, return_report=True, **options
    )
    row = replaced(report)
    count = sum(parameter.numel() for parameter in donor.mixer.parameters())
    assert row.parameters["moved"] == count
    assert row.parameters["dropped"] == 0
    layer = converted.mixer.attnrewrite_attention
    value = donor.mixer.inputs[0].weight.flatten(1).unflatten(0, (HEADS, 3, DIM))[:, 2].flatten(0, 1)
    own = layer.v_proj.weight if to == "manhattan" else layer.qkv.weight[-WIDTH:]
    assert torch.equal(own, value)
    assert all(name.startswith("attnrewrite_attention.") for name, _ in converted.mixer.named_parameters())


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "groups": 3}], ids=["kernel 3", "groups"]
)
def test_a_convolution_that_is_no_linear_map_of_channels_is_none(options):
    mixer = MapAttention()
    mixer.inputs[0] = nn.Conv2d(WIDTH, 3 * WIDTH, **options)
    (reason,) = reasons(map_model(mixer), map_images())
    assert reason == UNPROJECTED


def test_a_strided_convolution_is_none():
    mixer = nn.Sequential(MapAttention(), nn.Upsample(scale_factor=2))
    mixer[0].inputs[0] = nn.Conv2d(WIDTH, 3 * WIDTH, 1, stride=2)
    mixer[0].forward = lambda x: mixer[0].proj(mixer[0].mix(*mixer[0].split(x)).reshape(len(x), WIDTH, 3, 5))
    assert UNPROJECTED in reasons(map_model(mixer), map_images())


def rolled(part, axis=0):
    return Projection(part.weight, part.bias, part.rows.roll(1, axis))


FAULTS = {
    "heads in another order": (MapAttention, lambda site: replace(site, query=rolled(site.query))),
    "dimensions in another order": (MapAttention, lambda site: replace(site, key=rolled(site.key, 1))),
    "merged in another order": (MapAttention, lambda site: replace(site, output=rolled(site.output))),
    "another scale": (MapAttention, lambda site: replace(site, scale=1.1 * site.scale)),
    "sides of the map exchanged": (MapWindows, lambda site: replace(site, grid=Grid(9, 6))),
    "windows of another shape": (MapWindows, lambda site: replace(site, keys=Window((6, 3)))),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_corrupted_reading_is_not_certified(fault):
    mixer, corrupt = FAULTS[fault]
    plan = lifted(map_model(mixer()), map_images(1, (24, 36)))
    flow = plan.flow
    site = next(planned.site for planned in plan.sites if isinstance(planned.site, AttentionSite))
    values = collect_values(flow, wanted_nodes([site]))
    with torch.no_grad():
        assert certify(site, flow, values).passed
        assert not certify(corrupt(site), flow, values).passed


def test_costs_are_those_of_tokens_through_linear_maps():
    donor = map_model()
    found = attnrewrite.analyze(donor, map_images(1))
    (row,) = [site for site in found.sites if site.kind == "SA"]
    tokens, products = 60, 2 * 60 * 60 * WIDTH
    assert row.macs == 4 * tokens * WIDTH**2 + products
    assert row.formula is not None


TIMM = {
    "visformer_tiny": {"embed_dim": 48, "depth": (0, 1, 1), "num_heads": 3},
    "coatnet_pico_rw_224": {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16},
}


@pytest.mark.parametrize("name", list(TIMM))
def test_whole_models_of_timm_keep_their_function(name):
    torch.manual_seed(0)
    donor = timm.create_model(name, img_size=64, num_classes=5, **TIMM[name]).double().eval()
    images = map_images(2, (64, 64))
    for to, options in (("identity", {}), ("neighborhood", {"kernel_size": 9})):
        converted, report = attnrewrite.convert(donor, to, images[:1], progress=False, return_report=True, **options)
        rows = [site for site in report.sites if site.kind == "attention"]
        assert {(site.status, site.exactness) for site in rows} == {("converted", "EXACT")}
        assert difference(converted(images), donor(images)) < 1e-12
