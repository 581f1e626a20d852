"""A corrupted lift must not be certified: every fault is planted into a site that was read right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from lifted_models import Lifted
from random_weights import perturbed

from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import wanted_nodes
from attnrewrite.ir.sites import AttentionSite, Grid, MlpSite, Projection, StemSite, Window
from attnrewrite.planning.stages import lifted


@pytest.fixture(scope="module")
def swin() -> Lifted:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(56, 84), window_size=7, embed_dim=24, depths=(2, 1), num_heads=(2, 4)
    )
    return Lifted(perturbed(model), torch.randn(1, 3, 56, 84))


@pytest.fixture(scope="module")
def vit() -> Lifted:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), depth=1, embed_dim=32, num_heads=4)
    return Lifted(perturbed(model), torch.randn(2, 3, 48, 80))


def test_sites_read_right_are_certified(swin: Lifted, vit: Lifted) -> None:
    for lifted_model in (swin, vit):
        for site in lifted_model.sites:
            certificate = lifted_model.certificate(site)
            assert certificate.passed, f"{site.name}: {certificate}"


def test_a_certificate_states_both_errors(swin: Lifted) -> None:
    certificate = swin.certificate(swin.first(AttentionSite))
    assert 0 < certificate.captured < 2e-5
    assert certificate.random < 1e-12


def swapped_heads(projection: Projection) -> Projection:
    return replace(projection, rows=projection.rows.flip(0))


@pytest.mark.parametrize("part", ["query", "key", "value", "output"])
def test_wrong_head_order(swin: Lifted, vit: Lifted, part: str) -> None:
    for lifted_model in (swin, vit):
        site = lifted_model.first(AttentionSite)
        assert isinstance(site, AttentionSite)
        fault = replace(site, **{part: swapped_heads(getattr(site, part))})
        assert not lifted_model.certificate(fault).passed


def test_wrong_dimension_order_inside_a_head(vit: Lifted) -> None:
    site = vit.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert site.value is not None
    fault = replace(site, value=replace(site.value, rows=site.value.rows.flip(1)))
    assert not vit.certificate(fault).passed


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (2, 3), (4, 4)])
def test_wrong_shift(swin: Lifted, shift: tuple[int, int]) -> None:
    site = swin.first(AttentionSite, lambda s: s.keys.shift == (3, 3))
    assert isinstance(site, AttentionSite)
    assert isinstance(site.keys, Window)
    assert not swin.certificate(replace(site, keys=replace(site.keys, shift=shift))).passed


def test_dropped_bias(swin: Lifted) -> None:
    site = swin.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert not swin.certificate(replace(site, bias=None)).passed


def test_flipped_bias_table(swin: Lifted) -> None:
    site = swin.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert site.bias is not None
    flipped = replace(site.bias, values=site.bias.values.transpose(1, 2))
    assert not swin.certificate(replace(site, bias=flipped)).passed


def test_transposed_grid(swin: Lifted) -> None:
    site = swin.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert site.grid is not None
    transposed = Grid(site.grid.width, site.grid.height)
    assert not swin.certificate(replace(site, grid=transposed)).passed


def test_wrong_scale(vit: Lifted) -> None:
    site = vit.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert not vit.certificate(replace(site, scale=site.scale * 1.01)).passed


def test_dropped_projection_bias(vit: Lifted) -> None:
    site = vit.first(AttentionSite)
    assert isinstance(site, AttentionSite)
    assert site.value is not None
    assert not vit.certificate(replace(site, value=replace(site.value, bias=None))).passed


def test_wrong_activation(vit: Lifted) -> None:
    site = vit.first(MlpSite)
    assert isinstance(site, MlpSite)
    fault = replace(site, stages=(replace(site.stages[0], name="gelu_tanh"),))
    assert not vit.certificate(fault).passed


def test_wrong_patch_order(swin: Lifted) -> None:
    site = swin.first(StemSite, lambda s: s.patches is not None)
    assert isinstance(site, StemSite)
    assert site.patches is not None
    assert not swin.certificate(replace(site, patches=site.patches.flip(-1))).passed


def test_wrong_stride(vit: Lifted) -> None:
    site = vit.first(StemSite)
    assert isinstance(site, StemSite)
    assert not vit.certificate(replace(site, stride=(8, 8))).passed


def test_weights_that_are_not_numbers_are_never_certified() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=4).eval()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[5, 5] = float("nan")
    plan = lifted(model, torch.randn(1, 3, 32, 32))
    flow = plan.flow
    sites = [planned.site for planned in plan.sites]
    values = collect_values(flow, wanted_nodes(sites))
    site = next(site for site in sites if isinstance(site, AttentionSite))
    with torch.no_grad():
        assert not certify(site, flow, values).passed
