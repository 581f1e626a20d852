"""Elementwise operations and bytes as polynomials, against counts at sizes that they were not made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnrewrite import analyze
from attnrewrite.costs.count.size_tracer import SizeTracer
from attnrewrite.costs.count.work import PARTS
from attnrewrite.hosts.loading import load_model

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5, "img_size": (64, 96)}
SWIN = {"window_size": 4, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 5, "img_size": 32}


def counted(model: nn.Module, image: torch.Tensor, size: tuple[int, int], path: str, batch: int = 1) -> dict[str, int]:
    trace = SizeTracer(model, ((image,), {})).at(*size, batch=batch)
    return {part: getattr(trace.of(path), part) for part in PARTS}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = load_model("timm:vit_tiny_patch16_224", **VIT).eval()
    return model, torch.zeros(1, 3, 64, 96)


def test_of_a_plain_transformer_on_every_multiple_of_its_patch(vit):
    model, image = vit
    report = analyze(model, image)
    for path in ("", "blocks.1.attn", "blocks.1.mlp", "patch_embed.proj"):
        work = report.work.modules[path]
        assert work.unit == 16
        for size in ((224, 160), (208, 304)):
            cost = work.at(*size)
            assert {part: getattr(cost, part) for part in PARTS} == counted(model, image, size, path)
    assert report.work.modules["blocks.1.mlp"].elementwise.as_poly().total_degree() == 2
    assert report.work.modules["blocks.1.attn"].elementwise.as_poly().total_degree() == 4


def test_evaluations_answer_with_it(vit):
    model, image = vit
    report = analyze(model, image)
    found = report.at(224, 160)
    expected = counted(model, image, (224, 160), "")
    assert {part: getattr(found, part) for part in PARTS} == expected
    here = report.at()
    assert here.elementwise == report.cost.elementwise
    assert (here.bytes_read, here.bytes_written) == (report.cost.bytes_read, report.cost.bytes_written)
    assert report.at(64, 96, batch=3).elementwise == counted(model, image, (64, 96), "", 3)["elementwise"]
    half = report.at(224, 160, dtype="float16")
    assert half.bytes_read is None  # of another dtype
    assert half.elementwise == expected["elementwise"]


def test_off_the_lattice_it_is_counted_where_the_model_takes_the_size():
    torch.manual_seed(0)
    model = load_model("timm:swin_tiny_patch4_window7_224", **SWIN).eval()
    image = torch.zeros(1, 3, 32, 32)
    report = analyze(model, image)
    root = report.work.modules[""]
    assert root.least == (64, 64)  # at 32 pixels the second stage is a single window, which is not shifted
    assert root.at(32, 32) is None
    for size in ((32, 32), (40, 56), (192, 224)):
        expected = counted(model, image, size, "")
        assert {part: getattr(report.at(*size), part) for part in PARTS} == expected


def test_a_model_of_one_size_has_none_elsewhere():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(1024 // 4, 4)

        def forward(self, pixels):
            return self.head(self.embed(pixels).relu().flatten(1))

    report = analyze(Fixed(), torch.zeros(1, 3, 32, 32))
    assert report.work.modules == {}
    assert report.at(32, 32).elementwise == 256
    assert report.at(64, 64).elementwise is None
