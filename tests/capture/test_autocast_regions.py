"""Models that turn autocast off for a part of themselves."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import CaptureError, ConversionError
from attnrewrite.modules.token_layers import TokenPerformer


class Precise(nn.Module):
    """Keeps its own precision."""

    def __init__(self, enabled: bool = False, spelling: type = torch.autocast) -> None:
        super().__init__()
        self.norm, self.enabled, self.spelling = nn.LayerNorm(24), enabled, spelling

    def forward(self, tokens: Tensor) -> Tensor:
        device = ("cpu",) if self.spelling is torch.autocast else ()
        with self.spelling(*device, enabled=self.enabled, dtype=torch.bfloat16):
            return self.norm(tokens.float().square())


class Attention(nn.Module):
    def __init__(self, precise: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.precise = nn.Linear(24, 72), nn.Linear(24, 24), precise

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 3, 8)).movedim(-2, 1).unbind(3)
        with torch.autocast("cpu", enabled=False) if self.precise else nullcontext():
            weights = (query.float() @ key.float().transpose(-1, -2) / 8**0.5).softmax(-1)
            mixed = weights @ value.float()
        return self.proj(mixed.transpose(1, 2).flatten(2).to(tokens.dtype))


class Transformer(nn.Module):
    def __init__(self, first: nn.Module, precise_attention: bool = False) -> None:
        super().__init__()
        self.embed, self.first = nn.Conv2d(3, 24, 16, 16), first
        self.norm, self.attn = nn.LayerNorm(24), Attention(precise_attention)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.first(self.embed(pixels).flatten(2).transpose(1, 2))
        return tokens + self.attn(self.norm(tokens))


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def built(first: nn.Module, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(first, **options).eval()


@pytest.mark.parametrize(
    "first",
    [Precise(), Precise(spelling=torch.cuda.amp.autocast), TokenPerformer(24, 24)],
    ids=["own", "of another device", "performer"],
)
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast")
def test_a_region_in_a_module_that_stays_keeps_its_precision(first):
    donor = built(first)
    converted = attnrewrite.convert(donor, "identity", IMAGES, sites="attn", progress=False)
    with torch.no_grad():
        assert torch.allclose(converted(IMAGES), donor(IMAGES), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(converted.first(IMAGES[:, 0, :16, :24]), donor.first(IMAGES[:, 0, :16, :24]))
    assert torch.autocast.__enter__ is torch.amp.autocast_mode.autocast.__enter__


def test_code_in_a_region_is_not_rewritten():
    """A graph of it would follow the autocast around it."""
    donor = built(nn.Identity(), precise_attention=True)
    assert "certified" in str(attnrewrite.explain(donor, IMAGES))
    with pytest.raises(ConversionError, match="its own code turns autocast off"):
        attnrewrite.convert(donor, "identity", IMAGES, sites="attn", progress=False)


def test_a_region_that_turns_autocast_on_is_not_captured():
    with pytest.raises(CaptureError, match="changes the autocast or gradient mode"):
        attnrewrite.explain(built(Precise(enabled=True)), IMAGES)


def test_autocast_is_as_it_was_after_a_failed_capture():
    class Failing(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return pixels if pixels.sum() > 0 else -pixels

    with pytest.raises(CaptureError, match="Failing cannot be exported"):
        attnrewrite.explain(Failing(), IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert (IMAGES[0, 0] @ IMAGES[0, 0]).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert (IMAGES[0, 0] @ IMAGES[0, 0]).dtype == torch.float32
