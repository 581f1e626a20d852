"""What the models of transformers return, and their methods, after a conversion."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import run
from small_models import difference, images, small_model

import attnrewrite
from attnrewrite.errors import ConversionError


@pytest.fixture
def pairs(pairs):
    """Copies: a call that asks for more outputs leaves hooks on a transformers model, which cannot be pickled."""
    return lambda *conversion: copy.deepcopy(pairs(*conversion))


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_vit_eager", "transformers_swin"])
def test_hidden_states_equal_the_originals(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model(pair.batch, output_hidden_states=True) for model in (pair.donor, pair.converted))
    assert len(actual.hidden_states) == len(expected.hidden_states) > 2
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert difference(ours, theirs) < pair.tolerance


def test_output_attentions_are_the_originals_where_the_operator_is(pairs):
    pair = pairs("transformers_vit_eager")
    with torch.no_grad():
        expected, actual = (
            model(pair.batch, output_attentions=True).attentions for model in (pair.donor, pair.converted)
        )
    assert difference(expected[0], expected[1]) > 1e-2  # so that layers that changed places would be seen
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 2e-6  # the original's softmax is in float32


NOT_PASSED = r"kwargs\['output_attentions'\] was not passed when this module was converted"


@pytest.mark.parametrize(
    ("name", "to", "reason"),
    [
        ("transformers_vit", "identity", NOT_PASSED),
        ("transformers_vit", "neighborhood", NOT_PASSED),
        ("transformers_swin", "identity", NOT_PASSED),
        ("transformers_swin", "neighborhood", NOT_PASSED),
        ("transformers_vit_eager", "neighborhood", "its new attention weights are not computed"),
    ],
)
def test_output_attentions_that_are_not_computed_are_refused(pairs, name, to, reason):
    pair = pairs(name, to)
    with torch.no_grad(), pytest.raises(ConversionError, match=reason):
        pair.converted(pair.batch, output_attentions=True).attentions[-1].sum()


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_swin"])
def test_eager_attentions_of_a_new_operator_are_not_the_originals(name):
    """The original's dense weights beside another operator's result would be wrong."""
    donor = small_model(name, attn_implementation="eager").float()
    example = images(name, 1, torch.float32)
    converted = attnrewrite.convert(donor, "neighborhood", example, kernel_size=3)
    with torch.no_grad(), pytest.raises(ConversionError, match="example inputs that make it return them"):
        converted(example, output_attentions=True).attentions[-1].sum()
    donor.config.output_attentions = converted.config.output_attentions = True
    with torch.no_grad(), pytest.raises(ConversionError, match="example inputs that make it return them"):
        converted(example).attentions[-1].sum()


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_swin"])
def test_tuples_instead_of_output_objects(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model(pair.batch, return_dict=False) for model in (pair.donor, pair.converted))
    assert isinstance(actual, tuple)
    assert difference(actual[0], expected[0]) < 1e-12


def test_labels_give_the_same_loss(pairs):
    pair = pairs("transformers_vit")
    labels = torch.tensor([1, 4])
    with torch.no_grad():
        expected, actual = (model(pair.batch, labels=labels).loss for model in (pair.donor, pair.converted))
    assert abs(float(actual - expected)) < 1e-12


def test_save_pretrained_round_trip(pairs, tmp_path):
    pair = pairs("transformers_vit")
    pair.converted.save_pretrained(tmp_path)
    loaded = type(pair.donor).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert difference(run(loaded, pair.batch), run(pair.donor, pair.batch)) < 1e-12


def test_switching_the_attention_implementation_changes_nothing(pairs):
    donor, converted = pairs("transformers_vit").copies()
    converted.set_attn_implementation("eager")
    batch = images("transformers_vit")
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9
