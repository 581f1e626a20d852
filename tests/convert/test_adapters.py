"""Low-rank adapters and parametrisations, added before and after a conversion."""

from __future__ import annotations

import pytest
import torch
from model_queries import projections_of, run
from pairs import converted_from
from small_models import assert_same_gradients, difference, gradients, images, small_model
from torch import nn

import attnrewrite


class LowRank(nn.Module):
    """A linear map with a trainable low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    torch.manual_seed(5)
    for name, module in list(model.named_modules()):
        if any(module is projection for projection in projections_of(model)):
            model.set_submodule(name, LowRank(module))
    assert any(isinstance(module, LowRank) for module in model.modules())
    return model


ADAPTED = ["timm_vit", "timm_vit_unfused", "timm_swin", "transformers_vit", "transformers_swin"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_before_conversion(name):
    donor = adapt(small_model(name))
    converted = converted_from(donor, name, "identity")
    assert any("attn" in n or "attention" in n for n in (s.name for s in attnrewrite.report(converted).converted))
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_after_conversion(pairs, name):
    donor, converted = pairs(name).copies()
    before = run(donor, images(name))
    adapt(donor), adapt(converted)
    assert difference(run(donor, images(name)), before) > 1e-4
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ["timm_vit", pytest.param("timm_swin", marks=pytest.mark.slow)])
def test_weight_norm_before_conversion(name):
    donor = small_model(name)
    for projection in projections_of(donor):
        nn.utils.parametrizations.weight_norm(projection)
    converted = converted_from(donor, name, "identity")
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))
