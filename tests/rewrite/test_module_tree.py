"""A converted model keeps its module names, classes, signatures, parameters and checkpoints."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from model_queries import rewritten_names, run, weights_of
from pairs import converted_from
from small_models import difference, images, logits, small_model
from torch import nn

import attnrewrite


def test_every_module_keeps_its_name_and_class(pair):
    for name, module in pair.donor.named_modules():
        assert isinstance(pair.converted.get_submodule(name), type(module)), name


def test_something_was_rewritten_and_the_donor_was_not(pair):
    assert rewritten_names(pair.converted)
    assert not rewritten_names(pair.donor)


def test_state_dict_keeps_keys_order_shapes_and_values(pair):
    before, after = pair.donor.state_dict(), weights_of(pair.converted)
    assert list(before) == list(after)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_the_original_checkpoint_loads_strictly(pair):
    converted = copy.deepcopy(pair.converted)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert difference(run(converted, pair.batch), run(pair.converted, pair.batch)) > 1e-3
    converted.load_state_dict(pair.donor.state_dict(), strict=True)
    assert torch.equal(run(converted, pair.batch), run(pair.converted, pair.batch))


def test_the_weights_of_the_converted_model_load_into_the_original(pair):
    donor = small_model(pair.name)
    nn.init.zeros_(next(donor.parameters()))
    donor.load_state_dict(weights_of(pair.converted), strict=True)
    assert torch.equal(run(donor, pair.batch), run(pair.donor, pair.batch))


@pytest.mark.parametrize("name", ["timm_vit", "torchvision_vit", "transformers_swin"])
def test_inplace_keeps_the_parameters_and_an_optimizer_made_before(name):
    donor, model = small_model(name), small_model(name)
    before = dict(model.named_parameters())
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (donor, model)]
    assert attnrewrite.convert(model, "identity", images(name, 1), inplace=True) is model
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[key] is parameter for key, parameter in before.items())
    untrained = run(donor, images(name))
    for module, optimizer in zip((donor, model), optimizers, strict=True):
        logits(module(images(name))).square().mean().backward()
        optimizer.step()
    assert difference(run(model, images(name)), untrained) > 1e-6
    assert difference(run(model, images(name)), run(donor, images(name))) < 1e-9


def test_forward_keeps_its_signature(identity):
    """Trainer drops the columns that the signature does not name, and torch.export finds dynamic shapes by it."""
    for name, module in identity.donor.named_modules():
        ours = identity.converted.get_submodule(name)
        assert inspect.signature(ours.forward) == inspect.signature(module.forward), name


def test_a_copy_shares_no_parameter_with_the_original(pair):
    ours = {parameter.data_ptr() for parameter in pair.converted.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in pair.donor.parameters())


def test_frozen_parameters_stay_frozen():
    donor = small_model("timm_vit")
    donor.blocks[0].attn.qkv.requires_grad_(False)
    converted = converted_from(donor, "timm_vit", "neighborhood")
    frozen = [name for name, parameter in converted.named_parameters() if not parameter.requires_grad]
    assert frozen == ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]
