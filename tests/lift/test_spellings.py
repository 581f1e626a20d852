"""One attention, spelled in many ways: the same projections must be read from all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnrewrite
from attnrewrite.ir.sites import AttentionSite, Global
from attnrewrite.planning.stages import lifted

HEADS, DIM, WIDTH = 3, 4, 12
PACKINGS = ("3hd", "h3d", "hd3", "separate", "kv")
PRODUCTS = ("fused", "matmul", "einsum", "bmm")
SCALES = ("query", "key", "scores", "divided")
EXTRAS = ("", "maximum", "dropout", "masked")


class Spelled(nn.Module):
    """Self-attention in a chosen spelling."""

    def __init__(self, packing: str, product: str, scale: str, extra: str) -> None:
        super().__init__()
        self.packing, self.product, self.scale, self.extra = packing, product, scale, extra
        sizes = {"separate": (1, 1, 1), "kv": (1, 2)}.get(packing, (3,))
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, count * WIDTH) for count in sizes)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[batch, heads, tokens, dim]``."""
        batch, tokens, _ = x.shape
        parts = [linear(x) for linear in self.inputs]
        if self.packing == "3hd":
            q, k, v = parts[0].reshape(batch, tokens, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.packing == "h3d":
            q, k, v = parts[0].view(batch, tokens, HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1)
        elif self.packing == "hd3":
            q, k, v = (parts[0].view(batch, tokens, HEADS, DIM, 3)[..., i].transpose(1, 2) for i in range(3))
        elif self.packing == "kv":
            q = parts[0].view(batch, tokens, HEADS, DIM).transpose(1, 2)
            k, v = parts[1].view(batch, tokens, 2, HEADS, DIM).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part.unflatten(-1, (HEADS, DIM)).movedim(-2, 1) for part in parts)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = DIM**-0.5
        if self.product == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        q = q * scale if self.scale == "query" else q
        k = k * scale if self.scale == "key" else k
        if self.product == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        elif self.product == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        else:
            scores = q @ k.transpose(-2, -1)
        scores = scores * scale if self.scale == "scores" else scores
        scores = scores / math.sqrt(DIM) if self.scale == "divided" else scores
        if self.extra == "maximum":
            scores = scores - scores.amax(dim=-1, keepdim=True)
        if self.extra == "masked":
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(2)
            scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(dim=-1)
        weights = self.drop(weights) if self.extra == "dropout" else weights
        if self.product == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if self.product == "bmm":
            return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (-1, HEADS))
        return weights @ v

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(*self.split(x))
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


def expected_rows(packing: str, part: int) -> Tensor:
    """Weight row of ``[head, dim]`` in the linear map that makes ``part`` (0 query, 1 key, 2 value)."""
    head, dim = torch.arange(HEADS)[:, None], torch.arange(DIM)
    if packing == "3hd":
        return part * WIDTH + head * DIM + dim
    if packing == "h3d":
        return head * 3 * DIM + part * DIM + dim
    if packing == "hd3":
        return head * 3 * DIM + dim * 3 + part
    return (part == 2 and packing == "kv") * WIDTH + head * DIM + dim


def spellings() -> list[tuple[str, str, str, str]]:
    """Every packing with every product, every scale and every extra, but not their whole cross product."""
    chosen = {(packing, product, "query", "") for packing, product in itertools.product(PACKINGS, PRODUCTS)}
    chosen |= {("3hd", product, scale, "") for product, scale in itertools.product(PRODUCTS[1:], SCALES)}
    chosen |= {("separate", product, "scores", extra) for product, extra in itertools.product(PRODUCTS[1:], EXTRAS)}
    return sorted(chosen)


@pytest.mark.parametrize(("packing", "product", "scale", "extra"), spellings())
@pytest.mark.parametrize("batch", [1, 2])
def test_roles_are_the_same_in_every_spelling(packing: str, product: str, scale: str, extra: str, batch: int) -> None:
    model = Spelled(packing, product, scale, extra).eval()
    plan = lifted(model, torch.randn(batch, 7, WIDTH))
    assert [planned.site.kind for planned in plan.sites] == ["attention"], plan
    site = plan.sites[0].site
    assert isinstance(site, AttentionSite)
    assert (site.heads, site.head_dim, site.keys) == (HEADS, DIM, Global())
    assert site.scale == pytest.approx(DIM**-0.5)
    assert (site.mask is not None) == (extra == "masked")
    for part, projection in enumerate((site.query, site.key, site.value)):
        assert projection is not None
        assert torch.equal(projection.rows, expected_rows(packing, part))
    assert site.output is not None
    assert torch.equal(site.output.rows, torch.arange(WIDTH).view(HEADS, DIM))
    assert site.dropout == pytest.approx(0.1 if extra == "dropout" else 0.0)


@pytest.mark.parametrize(("packing", "product", "scale", "extra"), spellings()[::3])
def test_every_spelling_is_rebuilt_exactly(packing: str, product: str, scale: str, extra: str) -> None:
    model = Spelled(packing, product, scale, extra).eval().double()
    example = torch.randn(1, 7, WIDTH, dtype=torch.float64)
    converted = attnrewrite.convert(model, "identity", example, fidelity="exact", strict=True)
    for other in (example, torch.randn(3, 7, WIDTH, dtype=torch.float64)):
        torch.testing.assert_close(converted(other), model(other), rtol=0, atol=1e-12)


class Talking(Spelled):
    """Heads are mixed between product and softmax (talking heads), so the scores are no product any more."""

    def __init__(self) -> None:
        super().__init__("3hd", "matmul", "scores", "")
        self.heads = nn.Linear(HEADS, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.heads((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


def test_mixed_heads_are_refused_with_the_operator_named() -> None:
    plan = lifted(Talking().eval(), torch.randn(2, 7, WIDTH))
    assert not plan.sites
    assert "linear" in plan.refused[0].reason
    with pytest.raises(attnrewrite.AttnRewriteError, match="linear"):
        attnrewrite.convert(Talking().eval(), "identity", torch.randn(2, 7, WIDTH))


class OverSamples(Spelled):
    """Attention along the batch: the classic mistake of giving [batch, tokens] where [tokens, batch] is expected."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_along_the_batch_is_never_silently_wrong(batch: int) -> None:
    model = OverSamples("3hd", "fused", "query", "").eval()
    other = torch.randn(4, 7, WIDTH)
    try:
        converted = attnrewrite.convert(model, "identity", torch.randn(batch, 7, WIDTH))
    except attnrewrite.AttnRewriteError:
        return
    torch.testing.assert_close(converted(other), model(other))
