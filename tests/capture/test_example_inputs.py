"""Example inputs: their spellings, their default, and what is said of wrong ones."""

from __future__ import annotations

import pytest
import torch
from model_queries import run
from small_models import images
from untouched import Counting, assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError


def filled(value):
    return torch.full((1, 3, 64, 64), value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(1, 3, 60, 60, dtype=torch.float64), r"VisionTransformer does not run on them .*\[1, 3, 60, 60\]"),
        (torch.randn(1, 4, 64, 64, dtype=torch.float64), r"\[1, 4, 64, 64\].*pass the shape and dtype"),
        (torch.randn(3, 64, 64, dtype=torch.float64), r"\[3, 64, 64\].*pass the shape and dtype"),
        (torch.randn(1, 3, 64, 64), r"torch\.float32.*pass the shape and dtype"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.long), r"torch\.int64.*pass the shape and dtype"),
        (filled(float("nan")), r"contains NaN or infinite values; pass finite"),
        (filled(float("inf")), r"contains NaN or infinite values; pass finite"),
        ("image.png", r"expected a tensor, a tuple or a dict of tensors, got str; .*torch\.randn"),
        (64, r"expected a tensor, a tuple or a dict of tensors, got int"),
        ({"image": torch.randn(1, 3, 64, 64, dtype=torch.float64)}, r"VisionTransformer does not run on them"),
        ((), r"VisionTransformer does not run on them \(no tensor\)"),
        (torch.randn(0, 3, 64, 64, dtype=torch.float64), r""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_example_inputs(model, example, message):
    before = values_of(model)
    with pytest.raises(ArgumentError, match=rf"(?s)example_inputs: .*{message}"):
        attnrewrite.convert(model, "identity", example, inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("spell", [lambda x: [x], lambda x: {"x": x}], ids=["list", "dict"])
def test_spellings_of_example_inputs(vit, batch, exact, spell):
    converted = attnrewrite.convert(vit, "identity", spell(batch))
    assert torch.equal(run(converted, batch), run(exact, batch))


def test_example_inputs_are_derived_from_the_model(vit, batch, exact):
    converted = attnrewrite.convert(vit, "identity")
    assert attnrewrite.report(converted).input_shapes == [[1, 3, 64, 64]]
    assert torch.equal(run(converted, batch), run(exact, batch))


def test_a_model_that_states_no_size_is_asked_for():
    with pytest.raises(ArgumentError, match=r"example_inputs: Counting does not say which image size.*torch\.randn"):
        attnrewrite.convert(Counting(), "identity")


def test_example_inputs_are_not_changed(vit):
    example = images("timm_vit")
    before = example.clone()
    attnrewrite.convert(vit, "identity", example)
    assert torch.equal(example, before)
    assert not example.requires_grad
