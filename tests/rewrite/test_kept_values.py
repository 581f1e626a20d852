"""Attributes in which a forward keeps what it computed: a rewritten one does not set them, and that is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small_models import difference, images, small_model
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionWarning
from attnrewrite.rewrite.kept_values import lost_values, run_keeping

NAME = "timm_vit"


def attended(attention, x):
    heads = (*x.shape[:2], 3, attention.num_heads, -1)
    query, key, value = attention.qkv(x).reshape(heads).permute(2, 0, 3, 1, 4)
    weights = (attention.scale * query @ key.transpose(-2, -1)).softmax(-1)
    return weights, attention.proj((weights @ value).transpose(1, 2).flatten(2))


def model_that(keep):
    """A ViT whose attention hands its weights to ``keep``."""
    model = small_model(NAME)

    class Keeping(type(model.blocks[0].attn)):
        def forward(self, x, *_, **__):
            weights, result = attended(self, x)
            keep(self, weights)
            return result

    for block in model.blocks:
        block.attn.__class__ = Keeping
    return model


def plainly(module, weights):
    module.last = weights


def in_a_dictionary(module, weights):
    module.maps = {"last": [weights.mean(1)]}


def at_a_child(module, weights):
    module.proj.attended = weights


def in_a_list(module, weights):
    module.history = [*getattr(module, "history", []), weights]


@pytest.mark.parametrize("to", ["identity", "neighborhood"])
@pytest.mark.parametrize(
    ("keep", "name"),
    [(plainly, "last"), (in_a_dictionary, "maps"), (at_a_child, "proj.attended"), (in_a_list, "history")],
)
def test_they_are_named(keep, name, to):
    model, x = model_that(keep), images(NAME, 1)
    before = copy.copy(vars(model.blocks[0].attn))
    with pytest.warns(ConversionWarning, match=rf"blocks\.0\.attn \({name}\), blocks\.1\.attn \({name}\)"):
        converted = attnrewrite.convert(model, to, x, progress=False)
    assert vars(model.blocks[0].attn) == before
    if to == "identity":
        assert difference(converted(x), model(x)) < 1e-9
    with pytest.warns(ConversionWarning, match=r"computed: blocks\.1\.attn"):
        attnrewrite.convert(model, to, x, keep="blocks.0.*", progress=False)


def test_they_are_named_after_a_plan_was_edited():
    plan = attnrewrite.plan(model_that(plainly), "neighborhood", images(NAME, 1)).drop("blocks.0.*")
    with pytest.warns(ConversionWarning, match=r"computed: blocks\.1\.attn \(last\);"):
        plan.apply()


def test_they_are_named_where_the_original_takes_no_other_values():
    class Picky(nn.Module):
        def forward(self, x):
            assert float(x[0]) == 1.0
            self.last = 2 * x
            return x

    arguments = {"x": torch.tensor([1.0, 2.0])}
    _, kept = run_keeping(Picky(), Picky(), arguments, training=False)
    assert lost_values(Picky(), arguments, kept, {}) == ["last"]


def test_a_warning_that_is_an_error_leaves_the_model():
    model, x = model_that(plainly), images(NAME, 1)
    kinds = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        with pytest.raises(ConversionWarning, match="rewritten modules do not set the attributes"):
            attnrewrite.convert(model, "identity", x, inplace=True, progress=False)
    assert [type(module) for module in model.modules()] == kinds


def a_mask(module, weights):
    module.mask = torch.ones(weights.shape[-2:]).triu()


def its_size(module, weights):
    module.size = weights.shape


@pytest.mark.parametrize("keep", [a_mask, its_size])
def test_what_is_the_same_for_every_image_is_nobodys_loss(keep):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        attnrewrite.convert(model_that(keep), "identity", images(NAME, 1), progress=False)


def test_what_a_child_that_is_still_called_keeps_is_not_lost():
    model = small_model(NAME)

    class Remembering(type(model.blocks[0].norm2)):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    for block in model.blocks:
        block.norm2.__class__ = Remembering
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        converted = attnrewrite.convert(model, "identity", images(NAME, 1), progress=False)
    converted(images(NAME, 2))
    assert all(block.norm2.last.shape[0] == 2 for block in converted.blocks)
