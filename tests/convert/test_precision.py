"""Autocast, bfloat16 and changes of dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import run
from small_models import difference, images, logits, small_model

import attnrewrite


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


def test_gradients_under_autocast_are_finite(pair):
    converted = copy.deepcopy(pair.converted).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = logits(converted(pair.batch.float())).float().square().sum()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in converted.parameters() if p.grad is not None)


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
