"""timm's own methods on a converted model."""

from __future__ import annotations

import pytest
import torch
from model_queries import run
from small_models import difference, images

from attnrewrite.errors import ConversionError


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_unfused", "timm_swin"])
def test_timm_features_equal_the_originals(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model.forward_features(pair.batch) for model in (pair.donor, pair.converted))
        assert difference(actual, expected) < 1e-12
        expected, actual = (
            model.forward_intermediates(pair.batch, intermediates_only=True) for model in (pair.donor, pair.converted)
        )
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 1e-12


def test_timm_intermediate_layers_equal_the_originals(pairs):
    pair = pairs("timm_vit")
    with torch.no_grad():
        expected, actual = (model.get_intermediate_layers(pair.batch, n=2) for model in (pair.donor, pair.converted))
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin"])
@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_timm_reset_classifier(pairs, name, to):
    _, converted = pairs(name, to).copies()
    with torch.no_grad():
        before = converted.forward_features(pairs(name, to).batch)
    converted.reset_classifier(3)
    converted.double()
    assert run(converted, pairs(name, to).batch).shape == (2, 3)
    with torch.no_grad():
        assert torch.equal(converted.forward_features(pairs(name, to).batch), before)
    converted.reset_classifier(0)
    assert run(converted, pairs(name, to).batch).ndim == 2


@pytest.mark.parametrize(
    "size",
    [
        {"img_size": (112, 112)},
        {"img_size": (84, 84)},
        {"img_size": (112, 112), "window_size": 7},
        {"img_size": (56, 56), "window_size": 4},
    ],
    ids=str,
)
def test_timm_swin_set_input_size_after_a_conversion_is_refused(pairs, size):
    donor, converted = pairs("timm_swin", "neighborhood").copies()
    batch = images("timm_swin", 2, size=size["img_size"])
    for model in (donor, converted):
        model.set_input_size(**size)
    assert run(donor, batch).isfinite().all()
    with pytest.raises(ConversionError, match=r"convert the model again with|set the model's size first, then convert"):
        run(converted, batch)


def test_timm_swin_set_input_size_to_the_present_one_changes_nothing(pairs):
    _, converted = pairs("timm_swin", "neighborhood").copies()
    converted.set_input_size(img_size=(56, 56))
    assert difference(run(converted, images("timm_swin")), run(pairs("timm_swin").donor, images("timm_swin"))) < 1e-12


def test_timm_vit_set_input_size_after_a_conversion_is_refused(pairs):
    donor, converted = pairs("timm_vit").copies()
    for model in (donor, converted):
        model.set_input_size(img_size=(96, 96))
    batch = images("timm_vit", size=(96, 96))
    assert run(donor, batch).isfinite().all()
    with pytest.raises(ConversionError, match=r"only be converted for \[any, 3, 64, 64\]; convert"):
        run(converted, batch)


def test_timm_names_for_optimizers_stay(pairs):
    pair = pairs("timm_swin", "neighborhood")
    assert pair.converted.no_weight_decay() == pair.donor.no_weight_decay()
    assert pair.converted.group_matcher() == pair.donor.group_matcher()
