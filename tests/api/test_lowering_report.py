"""``explain_lowering``: what runs where, and why not elsewhere."""

from __future__ import annotations

import pytest
import torch
from small_models import images, small_model
from torch import nn
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError
from attnrewrite.lowering import use_backend
from attnrewrite.models import create_model
from attnrewrite.modules import NeighborhoodAttention2d


@pytest.fixture(scope="module")
def converted():
    return attnrewrite.convert(small_model("timm_swin"), "neighborhood", images("timm_swin"), progress=False)


def test_calls_of_a_converted_model_with_their_modules(converted):
    before = values_of(converted)
    found = attnrewrite.explain_lowering(converted, images("timm_swin"))
    assert_untouched(converted, before)
    attentions = [site for site in attnrewrite.report(converted).sites if site.kind == "attention"]
    assert len(found.calls) == len(attentions)
    for call in found.calls:
        assert converted.get_submodule(call.module)
        assert call.operator == "grouped_attention"
        assert call.refusals[call.backend] is None
    assert "blocks.{0...1}" in str(found)


def test_the_choice_is_that_of_the_context(converted):
    with use_backend("reference"):
        found = attnrewrite.explain_lowering(converted, images("timm_swin"))
    assert {call.backend for call in found.calls} == {"reference"}


def test_it_says_why_not():
    model = create_model("transnext_micro", num_classes=3).eval()
    found = attnrewrite.explain_lowering(model, torch.randn(1, 3, 64, 64), training=True)
    assert {call.operator for call in found.calls} == {"local_attention", "conv_glu"}
    refused = {(call.operator, "tiled"): call.refusals["tiled"] for call in found.calls}
    assert refused["conv_glu", "tiled"] == "it does not implement conv_glu"
    for (operator, backend), reason in refused.items():
        assert f"{backend} does not run {operator}: {reason}" in str(found)
    assert str(found).startswith("Backends in training")


def test_where_none_can_run_it_the_report_says_so():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = NeighborhoodAttention2d(8, 2, 3)

        def forward(self, x):
            return self.attention(x)

    with use_backend("tiled"):
        found = attnrewrite.explain_lowering(create_model("transnext_micro").eval(), torch.randn(1, 3, 64, 64))
    assert {call.backend for call in found.calls} == {None}
    assert "none can run it" in str(found)
    assert attnrewrite.explain_lowering(Halves(), torch.randn(1, 5, 5, 8)).calls[0].module == "attention"


def test_a_model_without_operators_is_told_what_to_do():
    assert "convert the model" in str(attnrewrite.explain_lowering(nn.Linear(3, 3), torch.randn(1, 3)))


def test_inputs_that_cannot_be_derived_are_asked_for():
    with pytest.raises(ArgumentError, match="example_inputs"):
        attnrewrite.explain_lowering(nn.Linear(3, 3))
