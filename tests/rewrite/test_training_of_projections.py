"""A projection that is moved from windows to their map must be, in training too, what it is token by token."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import difference
from torch import nn

import attnrewrite


class Rolling(nn.Linear):
    """Mixes tokens in training."""

    def forward(self, x):
        y = super().forward(x)
        return y + y.roll(1, -2) if self.training else y


class Centered(nn.Module):
    """An adapter that looks at all tokens of a window in training."""

    def __init__(self, given, made):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(given, made), nn.Linear(given, 4), nn.Linear(4, made)

    def forward(self, x):
        low = self.down(x)
        return self.base(x) + self.up(low - low.mean(-2, keepdim=True) if self.training else low)


class Deciding(nn.Linear):
    """Another map for groups of more tokens than a window has, which a wide map has."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight if x.shape[-2] < 20 else 2 * self.weight, self.bias)


class Dropping(nn.Module):
    """An adapter with dropout, as they are: it follows the mode."""

    def __init__(self, given, made):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(given, made), nn.Linear(given, 4), nn.Linear(4, made)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


def swin(projection, child):
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=5,
        drop_path_rate=0.0, strict_img_size=False,
    )  # fmt: skip
    for block in model.layers[0].blocks:
        old = getattr(block.attn, child)
        setattr(block.attn, child, projection(old.in_features, old.out_features))
    return model.double().eval()


@pytest.mark.parametrize("child", ["qkv", "proj"])
@pytest.mark.parametrize("projection", [Rolling, Centered, Deciding])
def test_it_is_refused_where_it_is_not(projection, child):
    model = swin(projection, child)
    plan = attnrewrite.plan(model, "identity", torch.randn(1, 3, 32, 32, dtype=torch.float64))
    reasons = [planned.why for planned in plan.sites if planned.site.kind == "attention"]
    wanted = "depends on a comparison of sizes" if projection is Deciding else "in training it does something else"
    assert len(reasons) == 2
    assert all(wanted in reason for reason in reasons), reasons


@pytest.mark.parametrize("child", ["qkv", "proj"])
def test_dropout_in_an_adapter_is_no_reason(child):
    model, x = swin(Dropping, child), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    converted = attnrewrite.convert(model, "identity", x[:1], progress=False)
    assert len([site for site in attnrewrite.report(converted).converted if site.kind == "attention"]) == 2
    assert difference(converted(x), model(x)) < 1e-12
    assert difference(converted.train()(x), converted(x)) > 1e-9
