"""Conversion in place, the returned report, revert, and converting twice."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import rewritten_names, run, weights_of
from small_models import difference, images, small_model
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError
from attnrewrite.reports.conversion import ConversionReport


def test_inplace_returns_the_model_itself(model, vit, batch):
    assert attnrewrite.convert(model, "identity", batch, inplace=True) is model
    assert rewritten_names(model)
    assert difference(run(model, batch), run(vit, batch)) < 1e-12


def test_return_report_is_the_report_of_the_model(vit, batch):
    converted, report = attnrewrite.convert(vit, "identity", batch, return_report=True)
    assert isinstance(report, ConversionReport)
    assert attnrewrite.report(converted) is report


def test_a_model_that_was_not_converted_has_no_report(vit):
    with pytest.raises(ArgumentError, match=r"model: VisionTransformer was not made by attnrewrite\.convert"):
        attnrewrite.report(vit)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        pytest.param("timm_swin", "identity", marks=pytest.mark.slow),
        ("torchvision_vit", "identity"),
        ("transformers_swin", "identity"),
    ],
)
def test_revert_restores_everything(name, to):
    model = small_model(name)
    before, expected = values_of(model), run(copy.deepcopy(model), images(name))
    attnrewrite.convert(model, to, images(name, 1), inplace=True)
    assert rewritten_names(model)
    assert attnrewrite.revert(model) is model
    assert_untouched(model, before)
    assert torch.equal(run(model, images(name)), expected)


def test_revert_keeps_what_was_trained(projected, batch, vit):
    converted = copy.deepcopy(projected)
    with torch.no_grad():
        converted.blocks[0].attn.qkv.weight.mul_(2)
    reverted = attnrewrite.revert(converted)
    expected = copy.deepcopy(vit)
    with torch.no_grad():
        expected.blocks[0].attn.qkv.weight.mul_(2)
    assert torch.equal(run(reverted, batch), run(expected, batch))


def test_revert_of_an_unconverted_model_is_refused(vit):
    with pytest.raises(ArgumentError, match=r"model: nothing in VisionTransformer was rewritten"):
        attnrewrite.revert(vit)


def test_a_reverted_model_has_no_report_and_converts_again(projected, batch):
    reverted = attnrewrite.revert(copy.deepcopy(projected))
    with pytest.raises(ArgumentError, match=r"was not made by attnrewrite\.convert"):
        attnrewrite.report(reverted)
    again = attnrewrite.convert(reverted, "neighborhood", batch, kernel_size=3)
    assert torch.equal(run(again, batch), run(projected, batch))


@pytest.mark.parametrize(
    ("name", "inplace"),
    [("timm_vit", False), ("timm_swin", True), pytest.param("transformers_vit", True, marks=pytest.mark.slow)],
)
def test_converting_twice_keeps_the_function(name, inplace):
    donor = small_model(name)
    once = attnrewrite.convert(donor, "identity", images(name, 1))
    twice = attnrewrite.convert(once, "identity", images(name, 1), inplace=inplace)
    assert difference(run(twice, images(name)), run(donor, images(name))) < 1e-12
    assert list(weights_of(twice)) == list(donor.state_dict())
    reverted = attnrewrite.revert(twice)
    assert {n: type(m) for n, m in reverted.named_modules()} == {n: type(m) for n, m in donor.named_modules()}
    assert torch.equal(run(reverted, images(name)), run(donor, images(name)))


def test_a_second_target_for_other_sites_composes(vit, batch):
    first = attnrewrite.convert(vit, "identity", batch, sites="blocks.0.*")
    second = attnrewrite.convert(first, "neighborhood", batch, kernel_size=3, sites="blocks.1.attn")
    direct = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, sites="blocks.1.attn")
    assert difference(run(second, batch), run(direct, batch)) < 1e-12
    assert {"blocks.0.attn", "blocks.1.attn"} <= set(rewritten_names(second))
