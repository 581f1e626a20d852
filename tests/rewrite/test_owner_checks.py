"""Rewritten modules are checked against their originals, one of every structure; what fails is refused by itself."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.ir.contract import BetweenProjections, Exactness, Target
from attnrewrite.ir.core import AttentionCore
from attnrewrite.planning import checks

HEAD_DIM = 8


class Numbered(AttentionCore):
    """Dense attention whose result is ``factor`` times what it should be; as repr prints them, all are alike."""

    def __init__(self, scale: float, factor: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [part.transpose(1, 2) for part in (query, key, value)]
        return self.factor * nn.functional.scaled_dot_product_attention(*parts, scale=self.scale).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


class ByNumber(Target):
    """Gives the n-th site the n-th scale and factor."""

    name = "by_number"

    def __init__(self, scales: tuple[float, ...], factors: tuple[float, ...]) -> None:
        self.scales, self.factors = scales, factors

    def convert(self, site: object, index: int, weights: object) -> BetweenProjections:
        return BetweenProjections(Exactness.EXACT, "it says", Numbered(self.scales[index], self.factors[index]))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options).double().eval()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_buffer_tells_two_modules_apart(model: nn.Module, batch: Tensor) -> None:
    right = 1 / math.sqrt(HEAD_DIM)
    target = ByNumber((right, right, right), (1.0, 1.0, 1.5))
    with pytest.raises(ConversionError, match=r"strict: 1 sites .*\n  blocks\.2\.attn: .* differs from the original"):
        attnrewrite.convert(model, target, batch, strict=True)


def test_a_small_digit_of_a_scale_tells_two_modules_apart(
    model: nn.Module, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = 1 / math.sqrt(HEAD_DIM)
    checked: list[str] = []
    run = checks.misbehavior
    monkeypatch.setattr(checks, "misbehavior", lambda owner, *given: checked.append(owner.path) or run(owner, *given))
    attnrewrite.plan(model, ByNumber((right, right * (1 + 1e-6), right), (1.0, 1.0, 1.0)), batch)
    assert checked == ["blocks.0.attn", "blocks.1.attn"]


class TwoAttentions(nn.Module):
    """Two in one forward, and the weights of the one that is ``used``."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.used = used
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights = []
        for qkv, out in zip(self.qkv, self.out, strict=True):
            query, key, value = qkv(tokens).unflatten(-1, (3, 2, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            weights.append((query @ key.transpose(-2, -1) / math.sqrt(HEAD_DIM)).softmax(-1))
            tokens = tokens + out((weights[-1] @ value).transpose(1, 2).flatten(2))
        return tokens, weights[self.used]


class UsingWeights(nn.Module):
    """Goes on computing with the weights that its child returns."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.stem, self.both = nn.Conv2d(3, 16, 8, 8), TwoAttentions(used)

    def forward(self, image: Tensor) -> Tensor:
        tokens, weights = self.both(self.stem(image).flatten(2).transpose(1, 2))
        return tokens.mean(1) + weights.amax((1, 2, 3))[:, None]


@pytest.mark.parametrize("used", [0, 1])
def test_of_two_sites_in_one_module_the_one_that_cannot_be_rewritten_is_refused(used: int, batch: Tensor) -> None:
    model = UsingWeights(used).double().eval()
    plan = attnrewrite.plan(model, "manhattan", batch)
    statuses = ["convert", "convert"]
    statuses[used] = "refused"
    assert [planned.status for planned in plan.sites if planned.site.kind == "attention"] == statuses
    assert "computes with its attention weights" in plan.sites[used].why
    expected, actual = model(batch), plan.apply()(batch)
    torch.testing.assert_close(actual, expected)


class UsingTokens(UsingWeights):
    """Looks at no weights."""

    def forward(self, image: Tensor) -> Tensor:
        tokens, _ = self.both(self.stem(image).flatten(2).transpose(1, 2))
        return tokens.mean(1)


@pytest.mark.parametrize("hooked", [0, 1])
def test_of_two_sites_in_one_module_only_that_whose_child_has_hooks_is_refused(hooked: int, batch: Tensor) -> None:
    model = UsingTokens(0).double().eval()
    model.both.out[hooked].register_forward_hook(lambda module, given, result: None)
    plan = attnrewrite.plan(model, "neighborhood", batch, official=True)
    statuses = ["convert", "convert"]
    statuses[hooked] = "refused"
    assert [planned.status for planned in plan.sites if planned.site.kind == "attention"] == statuses
    assert f"hooks on its child out.{hooked} would no longer fire" in plan.sites[hooked].why
