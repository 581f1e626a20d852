"""What ``explain`` says to somebody who knows no internals, and to somebody who does."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from model_queries import weights_of
from torch import nn

import attnrewrite
from attnrewrite.api.explanation import explain


@pytest.fixture(scope="module")
def swin():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10).eval()
    return explain(model)


def test_it_begins_with_a_summary_of_ten_lines_that_fits_the_terminal(swin, monkeypatch):
    for columns in (80, 100, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(swin).splitlines()
        summary = lines[: lines.index("")]
        assert 8 <= len(summary) <= 12
        assert max(map(len, lines)) <= columns
        assert len(lines) < 120
    assert summary[0] == (
        "SwinTransformer at 1x3x224x224: 12 attentions, 12 MLPs, 4 stems and merges, all proved"
    )


def test_the_summary_says_what_each_target_would_do_and_save(swin):
    (row,) = [line.split("  ") for line in swin.summary() if line.startswith("  neighborhood")]
    assert [cell.strip() for cell in row if cell] == ["neighborhood", "12 of 12", "same function", "140M -> 124M MACs"]
    (also,) = [line for line in swin.summary() if line.startswith("  also: ")]
    assert "transnext" in also


def test_the_next_command_runs():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    images = torch.randn(4, 3, 32, 32)
    command = explain(model, images[:1]).summary()[-1].removeprefix("next: ")
    code = command.replace("(model, ", "(model, example_inputs=images[:1], ").partition(" says")[0]
    scope = {"attnrewrite": attnrewrite, "model": model, "images": images}
    exec(code, scope)
    assert attnrewrite.report(scope["converted"]).converted
    assert weights_of(scope["converted"]).keys() >= set(model.state_dict())


def test_sites_that_are_alike_share_an_entry(swin):
    entries = [line for line in swin.details() if line.startswith("%")]
    counted = sum(int(found[1]) if (found := re.search(r"and (\d+) like it", entry)) else 0 for entry in entries)
    assert len(entries) + counted == len(swin.plan.sites) == 28
    assert len(entries) < 8


def test_what_could_not_be_read_is_said_with_its_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.qkv, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 96), nn.Linear(32, 5)

        def forward(self, x):
            q, k, v = self.qkv(self.stem(x).flatten(2).mT).chunk(3, -1)
            return self.head(((q @ k.mT).tanh().softmax(-1) @ v).mean(1))

    text = str(explain(Net().eval(), torch.randn(1, 3, 32, 32)))
    assert "could not be read" in text
    reason = "aten::tanh acts on the scores before the softmax; only scale, bias and mask are allowed there"
    assert reason in " ".join(text.split())


def test_places_of_other_names_that_share_a_reason():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + (q @ k.mT).tanh().softmax(-1) @ v

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.last = nn.Conv2d(3, 32, 8, 8), nn.Sequential(Block(), Block()), Block()

        def forward(self, x):
            return self.last(self.blocks(self.stem(x).flatten(2).mT)).mean(1)

    found = [line for line in explain(Net().eval(), torch.randn(1, 3, 32, 32)).details() if "refused attention" in line]
    assert [line.split(":")[0] for line in found] == [
        "refused attention @ blocks.{0...1}",
        "refused attention @ last",
    ]


def test_sites_that_nothing_takes_say_why():
    stem = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2))
    lines = explain(stem.eval(), torch.randn(1, 3, 32, 32)).summary()
    assert len(lines) > 1


def test_a_model_without_attention():
    assert "no attention, MLP or stem recognized" in str(explain(nn.Linear(4, 4), torch.randn(1, 4)))
