"""Shared blocks, tied weights and gradient checkpointing."""

from __future__ import annotations

import pytest
from model_queries import rewritten_names, run, weights_of
from pairs import converted_from
from small_models import assert_same_gradients, difference, gradients, images, small_model


@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_a_block_used_twice_stays_one_block(to):
    donor = small_model("timm_vit")
    donor.blocks[1] = donor.blocks[0]
    converted = converted_from(donor, "timm_vit", to)
    assert converted.blocks[1] is converted.blocks[0]
    assert len(list(converted.parameters())) == len(list(donor.parameters()))
    assert list(weights_of(converted)) == list(donor.state_dict())
    if to == "identity":
        assert difference(run(converted, images("timm_vit")), run(donor, images("timm_vit"))) < 1e-12
        assert_same_gradients(gradients(converted, images("timm_vit")), gradients(donor, images("timm_vit")))
    else:
        assert rewritten_names(converted)


def test_tied_weights_stay_tied():
    donor = small_model("timm_vit")
    donor.blocks[1].attn.qkv.weight = donor.blocks[0].attn.qkv.weight
    converted = converted_from(donor, "timm_vit", "identity")
    assert converted.blocks[1].attn.qkv.weight is converted.blocks[0].attn.qkv.weight
    assert_same_gradients(gradients(converted, images("timm_vit")), gradients(donor, images("timm_vit")))


def checkpointed(model, name):
    if name.startswith("timm"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "transformers_vit", "transformers_swin"])
def test_gradient_checkpointing_after_conversion(pairs, name):
    pair = pairs(name, "neighborhood" if name.endswith("vit") else "identity")
    _, plain = pair.copies()
    _, converted = pair.copies()
    expected = gradients(plain, pair.batch, train=True)
    assert_same_gradients(gradients(checkpointed(converted, name), pair.batch, train=True), expected)


@pytest.mark.parametrize("name", ["timm_vit", pytest.param("transformers_swin", marks=pytest.mark.slow)])
def test_gradient_checkpointing_switched_on_before_conversion(pairs, name):
    donor = checkpointed(small_model(name), name)
    converted = converted_from(donor, name, "identity")
    expected = gradients(small_model(name), images(name), train=True)
    assert_same_gradients(gradients(converted, images(name), train=True), expected)
