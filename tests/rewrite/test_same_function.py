"""A conversion that keeps the function gives the original's outputs and gradients; a smaller kernel, masked ones."""

from __future__ import annotations

import pytest
import torch
from model_queries import run
from neighborhood_oracle import masked_logits
from pairs import CONVERSIONS, SWINS, converted_from
from small_models import assert_same_gradients, difference, gradients, images, logits, small_model

import attnrewrite


def test_identity_keeps_the_function(identity):
    error = difference(run(identity.converted, identity.batch), run(identity.donor, identity.batch))
    assert error < identity.tolerance
    kinds = {site.kind for site in attnrewrite.report(identity.converted).converted}
    assert kinds == {"attention", "mlp", "stem"}


def test_identity_refuses_no_site(identity):
    """Every site there is can be rebuilt; a refused one was no site, and would make ``strict`` fail."""
    refused = [site for site in attnrewrite.report(identity.converted).sites if site.status == "refused"]
    assert [(site.name, site.source, site.why) for site in refused] == []


@pytest.mark.parametrize("name", SWINS)
def test_windows_become_neighborhoods_exactly(pairs, name):
    pair = pairs(name, "neighborhood")
    assert difference(run(pair.converted, pair.batch), run(pair.donor, pair.batch)) < 1e-12


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_batch_of_the_example_does_not_matter(pair, batch):
    many = images(pair.name, 5)
    together = run(pair.converted, many)
    assert difference(run(pair.converted, many[:batch]), together[:batch]) < pair.tolerance


@pytest.mark.parametrize("name", ["timm_vit", "torchvision_swin", "transformers_swin"])
def test_an_example_of_several_images_converts_the_same_sites(pairs, name):
    one = attnrewrite.report(pairs(name).converted)
    several = attnrewrite.report(converted_from(pairs(name).donor, name, "identity", images(name, 3)))
    assert [site.name for site in several.converted] == [site.name for site in one.converted]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("name", "to"), [(n, to) for n, to in CONVERSIONS if to == "identity" or n in SWINS])
def test_gradients_equal_the_originals(pairs, name, to, train):
    pair = pairs(name, to)
    donor, converted = pair.copies()
    assert_same_gradients(gradients(converted, pair.batch, train), gradients(donor, pair.batch, train))


def test_every_parameter_that_had_a_gradient_has_one(pair):
    donor, converted = pair.copies()
    expected, actual = gradients(donor, pair.batch), gradients(converted, pair.batch)
    assert {n for n, g in actual.items() if g is None} == {n for n, g in expected.items() if g is None}


def test_the_gradient_of_the_image_equals_the_originals(identity):
    found = []
    for model in (identity.donor, identity.converted):
        batch = identity.batch.clone().requires_grad_()
        found.append(torch.autograd.grad(logits(model(batch)).square().sum(), batch)[0])
    assert difference(found[1], found[0]) < 1000 * identity.tolerance


@pytest.mark.parametrize(("size", "fused"), [((64, 64), True), ((64, 96), False), ((96, 48), True)], ids=str)
def test_neighborhood_equals_masked_attention(size, fused):
    donor = small_model("timm_vit" if fused else "timm_vit_unfused", img_size=size)
    batch = images("timm_vit", 2, size=size)
    converted = attnrewrite.convert(donor, "neighborhood", batch[:1], kernel_size=3)
    expected = masked_logits(donor, batch, 3)
    actual = converted(batch)
    assert difference(actual, expected) < 1e-9
    assert difference(actual, donor(batch)) > 1e-4
    wanted = torch.autograd.grad(expected.square().sum(), list(donor.parameters()))
    found = torch.autograd.grad(actual.square().sum(), list(converted.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-9 * largest
