"""Autocast, bfloat16 and changes of dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import run
from small_models import difference, images, logits, small_model
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionError


def test_autocast_to_bfloat16_is_close(pair):
    donor, converted = (model.float() for model in pair.copies())
    batch = pair.batch.float()
    expected = run(converted, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual, theirs = run(converted, batch), run(donor, batch)
    assert actual.dtype == theirs.dtype
    assert bool(actual.isfinite().all())
    error, original = (difference(output.float(), expected) for output in (actual, theirs))
    assert error < (1.5 * original + 0.02 if pair.same_function else 0.15)


def test_gradients_under_autocast_point_the_same_way(pair):
    flat = []
    for dtype in (torch.float32, torch.bfloat16):
        converted = copy.deepcopy(pair.converted).float()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits(converted(pair.batch.float())).float().square().sum().backward()
        flat.append(torch.cat([p.grad.flatten() for p in converted.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*flat, dim=0) > 0.95


@pytest.mark.parametrize("name", ["timm_vit_unfused", "timm_swin", "torchvision_vit", "transformers_vit_eager"])
def test_a_bfloat16_model_converts(name):
    donor, to = small_model(name).bfloat16(), "neighborhood"
    converted = attnrewrite.convert(donor, to, images(name, 1, torch.bfloat16))
    actual, expected = (run(model, images(name, 2, torch.bfloat16)) for model in (converted, donor))
    assert actual.dtype == torch.bfloat16
    assert difference(actual.float(), expected.float()) < 0.1
    assert {site.kind for site in attnrewrite.report(converted).converted} == {"attention"}


def test_a_converted_model_can_change_its_dtype(identity):
    single = copy.deepcopy(identity.converted).float()
    half = copy.deepcopy(identity.converted).bfloat16()
    expected = run(identity.converted, identity.batch)
    assert difference(run(single, identity.batch.float()).double(), expected.double()) < 1e-4
    assert difference(run(half, identity.batch.bfloat16()).double(), expected.double()) < 0.1


class IllConditioned(nn.Module):
    """Blows up what its ViT rounds off."""

    def __init__(self, factor):
        super().__init__()
        self.vit, self.factor = small_model("timm_vit").float(), factor

    def forward(self, x):
        logits = self.vit(x)
        return torch.sin(logits * self.factor)


def test_an_ill_conditioned_model_is_compared_with_its_own_rounding():
    model, batch = IllConditioned(1e4).eval(), images("timm_vit", 2, torch.float32)
    report = attnrewrite.plan(model, "aggregated", batch, fidelity="exact").apply().attnrewrite_report
    assert report.output_error > 1e-3
    assert {site.exactness for site in report.converted} == {"EXACT"}
    planned = attnrewrite.plan(model, "aggregated", batch, fidelity="exact")
    for owner in planned.programs:
        for core in owner.modules.values():
            vars(core).update(scale=1.5 * vars(core).get("scale", 0))
    with pytest.raises(ConversionError, match=r"differs from the original by .*, whose own outputs are rounded to"):
        planned.apply()
