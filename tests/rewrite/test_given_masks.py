"""Masks that a module is given, made from sizes alone: constants of the captured call, and not of every other."""

from __future__ import annotations

import pytest
import torch
from small_models import difference
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import ConversionError


class Masked(nn.Module):
    """Attention that is given what it adds to its scores, or a map of what may be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.packed(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """``kind``: ``packed``, all samples are one sequence and a mask keeps them apart (Pixtral); ``open``, a mask that
    hides nothing, given only while a graph is traced (transformers); ``blocks``, halves that do not see each other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.attention = kind, nn.Conv2d(3, 24, 16, 16), Masked()

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        samples, tokens, _ = x.shape
        if self.kind == "packed":
            x = x.flatten(0, 1)[None]
        return self.attention(x, self.mask(samples, tokens)).view(samples, tokens, -1).mean(1)

    def mask(self, samples: int, tokens: int) -> Tensor | None:
        if self.kind == "open":
            return torch.ones(1, 1, tokens, tokens, dtype=torch.bool) if torch.compiler.is_exporting() else None
        count, size = (samples, tokens) if self.kind == "packed" else (2, tokens // 2)
        apart = torch.block_diag(*[torch.ones(size, size)] * count)
        return torch.zeros_like(apart, dtype=self.embed.weight.dtype).masked_fill(apart == 0, -torch.inf)[None, None]


def donor(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Model(kind).eval().double()


def images(count: int, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def test_samples_that_only_a_mask_keeps_apart_are_refused():
    with pytest.raises(ConversionError, match=r"batch of 2: x has shape \[1, 32, 24\]"):
        attnrewrite.convert(donor("packed"), "identity", images(1), sites="attention*", progress=False)


@torch.no_grad()
@pytest.mark.parametrize(("to", "options"), [("identity", {}), ("neighborhood", {"kernel_size": 4})])
def test_a_mask_that_hides_nothing_may_be_left_out(to, options):
    model = donor("open")
    converted = attnrewrite.convert(model, to, images(1), fidelity="exact", progress=False, **options)
    assert [row.kind for row in attnrewrite.report(converted).converted].count("attention") == 1
    for count in (1, 3):
        batch = images(count)
        assert difference(converted(batch), model(batch)) < 1e-12
    tokens, seen = torch.randn(2, 16, 24).double(), torch.zeros(1, 1, 16, 16).double()
    assert difference(converted.attention(tokens, seen), model.attention(tokens, seen)) < 1e-12
    with pytest.raises(ConversionError, match=r"mask, .* is not what it was when this module was converted"):
        converted.attention(tokens, seen.masked_fill(torch.eye(16) == 0, -torch.inf))


@torch.no_grad()
def test_a_mask_that_the_core_holds_must_stay_what_it_was():
    model = donor("blocks")
    converted = attnrewrite.convert(model, "identity", images(1), fidelity="exact", progress=False)
    for count in (1, 3):
        batch = images(count)
        assert difference(converted(batch), model(batch)) < 1e-12
    tokens, mask = torch.randn(2, 16, 24, dtype=torch.float64), model.mask(1, 16)
    assert difference(converted.attention(tokens, mask), model.attention(tokens, mask)) < 1e-12
    with pytest.raises(ConversionError, match=r"mask, .* is not what it was when this module was converted"):
        converted.attention(tokens, torch.zeros_like(mask))
    with pytest.raises(ConversionError, match="mask, None, is not what it was"):
        converted.attention(tokens)
