"""torch.export and torch.compile of a converted model."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import run
from small_models import assert_same_gradients, difference, gradients, images, logits
from torch.export import Dim


@pytest.mark.parametrize(
    "name", ["timm_swin", pytest.param("torchvision_vit", marks=pytest.mark.slow), "transformers_swin"]
)
def test_torch_export_of_the_converted_model(pairs, name):
    pair = pairs(name, "identity" if "vit" in name else "neighborhood")
    exported = torch.export.export(pair.converted, (pair.batch,), strict=False)
    assert difference(logits(exported.module()(pair.batch)), run(pair.converted, pair.batch)) < pair.tolerance


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        ("torchvision_vit", "identity"),
        pytest.param("torchvision_swin", "neighborhood", marks=pytest.mark.slow),
        ("transformers_vit", "identity"),
    ],
)  # the originals of all four can
def test_torch_export_with_a_dynamic_batch(pairs, name, to):
    pair = pairs(name, to)
    argument = "pixel_values" if "transformers" in name else "x"
    dynamic = {argument: {0: Dim("batch", min=2, max=64)}}
    exported = torch.export.export(pair.converted, (pair.batch,), dynamic_shapes=dynamic, strict=False)
    more = images(name, 5)
    assert difference(logits(exported.module()(more)), run(pair.converted, more)) < 1e-12


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        pytest.param("torchvision_swin", "identity", marks=pytest.mark.slow),
        pytest.param("transformers_vit", "identity", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_keeps_the_values(pairs, name, to):
    pair = pairs(name, to)
    torch.compiler.reset()
    model = copy.deepcopy(pair.converted)
    compiled = torch.compile(model, backend="aot_eager", fullgraph="transformers" not in name)
    with torch.no_grad():
        assert difference(logits(compiled(pair.batch)), run(pair.converted, pair.batch)) < 1e-12


def test_torch_compile_trains(pairs):
    pair = pairs("timm_vit", "neighborhood")
    torch.compiler.reset()
    _, converted = pair.copies()
    expected = gradients(copy.deepcopy(converted), pair.batch)
    compiled = torch.compile(converted, backend="aot_eager")
    (logits(compiled(pair.batch)) * torch.arange(1, 6)).square().sum().backward()
    assert_same_gradients({name: p.grad for name, p in converted.named_parameters()}, expected)
