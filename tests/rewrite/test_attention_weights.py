"""Attention weights that a model returns or computes with: those of the new operator, or a sentence that says how."""

from __future__ import annotations

import pytest
import torch
from small_models import difference, images, small_model
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.rewrite.attention_weights import unavailable

OPERATORS = {
    "neighborhood": {"kernel_size": 3},
    "aggregated": {},
    "long_short_distance": {"group_size": 2},
}


class Attention(nn.Module):
    def __init__(self, order="bhxy"):
        super().__init__()
        self.qkv, self.proj, self.order = nn.Linear(32, 96), nn.Linear(32, 32), order

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
        if self.order == "hbxy":
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * 16**-0.5).softmax(-1)
        mixed = weights @ v
        if self.order == "hbxy":
            mixed = mixed.transpose(0, 1)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c)), weights


class Net(nn.Module):
    """Returns its weights, or their mean over heads, or weighs its tokens with them, or drops them."""

    def __init__(self, use="returned", order="bhxy"):
        super().__init__()
        self.stem, self.attention, self.use = nn.Conv2d(3, 32, 8, 8), Attention(order), use

    def forward(self, x):
        mixed, weights = self.attention(self.stem(x).flatten(2).transpose(1, 2))
        if self.use == "dropped":
            return mixed.mean(1)
        if self.use == "weighing":
            received = weights.mean((-3, -2)) if self.attention.order == "bhxy" else weights.mean((0, 2))
            return (mixed * received[..., None]).sum(1)
        return mixed.mean(1), weights if self.use == "returned" else weights.mean(1)


def made(use, order="bhxy"):
    torch.manual_seed(0)
    model = Net(use, order).double().eval()
    with torch.no_grad():
        model.attention.qkv.weight.mul_(6)
    return model, torch.randn(3, 3, 64, 64, dtype=torch.float64)


def attended(model, x, weights):
    """What the model makes of its map with these ``[batch, heads, queries, keys]`` weights."""
    tokens = model.stem(x).flatten(2).transpose(1, 2)
    value = model.attention.qkv(tokens).view(3, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)[2]
    return model.attention.proj((weights @ value).transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("to", OPERATORS)
@pytest.mark.parametrize("order", ["bhxy", "hbxy"])
def test_returned_weights_are_those_of_the_new_operator(to, order):
    donor, x = made("returned", order)
    converted = attnrewrite.convert(donor, to, x[:1], progress=False, **OPERATORS[to])
    mixed, weights = converted(x)
    assert weights.shape == donor(x)[1].shape
    weights = weights.transpose(0, 1) if order == "hbxy" else weights
    assert difference(attended(donor, x, weights), mixed) < 1e-12
    assert float((weights.sum(-1) - 1).abs().max()) < 1e-12


def test_a_neighborhood_shows_in_the_weights():
    donor, x = made("returned")
    weights = attnrewrite.convert(donor, "neighborhood", x[:1], kernel_size=3, progress=False)(x)[1]
    assert ((weights != 0).sum(-1) == 9).all()


def test_the_mean_over_heads_is_that_of_the_new_weights():
    donor, x = made("averaged")
    full, _ = made("returned")
    options = {"kernel_size": 3, "progress": False}
    expected = attnrewrite.convert(full, "neighborhood", x[:1], **options)(x)[1].mean(1)
    actual = attnrewrite.convert(donor, "neighborhood", x[:1], **options)(x)[1]
    assert difference(actual, expected) < 1e-14


def test_a_model_that_computes_with_its_weights_gets_the_new_ones():
    donor, x = made("weighing")
    converted = attnrewrite.convert(donor, "neighborhood", x[:1], kernel_size=7, progress=False)
    full, _ = made("returned")
    weights = attnrewrite.convert(full, "neighborhood", x[:1], kernel_size=7, progress=False)(x)[1]
    tokens = donor.stem(x).flatten(2).transpose(1, 2)
    value = donor.attention.qkv(tokens).view(3, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)[2]
    mixed = donor.attention.proj((weights @ value).transpose(1, 2).flatten(2))
    assert difference(converted(x), (mixed * weights.mean((1, 2))[..., None]).sum(1)) < 1e-12


def test_weights_have_gradients():
    donor, x = made("returned")
    converted = attnrewrite.convert(donor, "neighborhood", x[:1], kernel_size=3, progress=False)
    converted(x)[1].square().sum().backward()
    assert float(converted.attention.qkv.weight.grad[:64].abs().max()) > 0


def test_weights_that_nobody_looks_at_are_not_computed():
    donor, x = made("dropped")
    converted = attnrewrite.convert(donor, "neighborhood", x[:1], kernel_size=3, progress=False)
    assert "unit_mixture" not in converted.attention.attnrewrite_rewriting.program.source
    with pytest.raises(ConversionError, match="example inputs that make it return them"):
        converted.attention(torch.randn(1, 64, 32, dtype=torch.float64))[1].sum()


def test_an_operator_that_does_more_than_weigh_returns_a_stand_in_or_is_refused():
    donor, x = made("returned")
    converted = attnrewrite.convert(donor, "manhattan", x[:1], progress=False)
    with pytest.raises(ConversionError, match="where the new operator has none"):
        converted(x)[1].sum()
    with pytest.raises(ConversionError, match="which the new operator does not produce"):
        attnrewrite.convert(made("weighing")[0], "manhattan", x[:1], progress=False)


@pytest.mark.parametrize("target", ["identity", "neighborhood"])
def test_transformers_models_give_the_weights_that_their_example_asks_for(target):
    donor = small_model("transformers_vit_eager").float()
    x = images("transformers_vit_eager", 1, torch.float32)
    options = {"kernel_size": 3} if target == "neighborhood" else {}
    example = {"pixel_values": x, "output_attentions": True}
    converted = attnrewrite.convert(donor, target, example, progress=False, **options)
    found = converted(x, output_attentions=True).attentions
    expected = donor(x, output_attentions=True).attentions
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours.sum(-1) - 1).abs().max()) < 1e-5
        assert (difference(ours, theirs) < 1e-5) == (target == "identity")
    assert difference(converted(x).logits, converted(x, output_attentions=True).logits) < 1e-6


def test_weights_with_dropout_are_refused():
    """A second draw would give others than those that the result was made with."""

    class Dropping(Attention):
        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
            weights = nn.functional.dropout((q @ k.mT * 16**-0.5).softmax(-1), 0.5, self.training)
            return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)), weights

    donor, x = made("returned")
    donor.attention = Dropping().double().eval()
    for to in ("identity", "neighborhood"):
        found = attnrewrite.plan(donor, to, x[:1]).sites
        reasons = [planned.why for planned in found if planned.site.kind == "attention"]
        assert "dropout would be drawn a second time" in reasons[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.stack([w]), lambda w: torch.isnan(w), lambda w: w * 2, lambda w: 2 * w, lambda w: w + 1,
        lambda w: torch.ones(2, 2) @ w, len, float, bool, list, lambda w: w[0], lambda w: w.mean(), lambda w: w.shape,
        lambda w: nn.functional.dropout(w), lambda w: torch.einsum("ij->i", w),
    ],
)  # fmt: skip
def test_any_use_of_a_stand_in_says_why(use):
    with pytest.raises(ConversionError, match="example inputs that make it return them"):
        use(unavailable())
