"""Attention as users write it, on tokens ``[batch, tokens, width]``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIDE = 24, 3, 8
HEAD_DIM = WIDTH // HEADS


class Packed(nn.Module):
    """Packed projections, heads laid out as ``order`` (3hd, h3d, hd3); ``scale`` says where the scale acts."""

    def __init__(self, order: str = "3hd", scale: str = "scores", stable: bool = False, talking: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.order, self.scale, self.stable = order, scale, stable
        self.talk = nn.Parameter(torch.eye(HEADS) + 0.3 * torch.randn(HEADS, HEADS)) if talking else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.scale == "k":
            scores = q @ (k * HEAD_DIM**-0.5).transpose(-2, -1)
        elif self.scale == "division":
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
        else:
            scores = (q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5
        if self.talk is not None:
            scores = torch.einsum("bhij,hg->bgij", scores, self.talk)
        if self.stable:
            scores = scores - scores.amax(-1, keepdim=True)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        else:
            weights = scores.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        packed = self.qkv(x)
        if self.order == "3hd":
            q, k, v = packed.reshape(batch, tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        elif self.order == "h3d":
            q, k, v = packed.reshape(batch, tokens, HEADS, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = packed.reshape(batch, tokens, HEADS, HEAD_DIM, 3).permute(4, 0, 2, 1, 3)
        return q, k, v


class MaximumSubtracted(Packed):
    """A softmax after the maximum is subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * HEAD_DIM**-0.5
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Separate projections, products as einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, HEAD_DIM)) for part in (self.q, self.k, self.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(HEAD_DIM**-0.5).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class KeyValuePacked(nn.Module):
    """A query projection and a packed one for keys and values; fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MultiQuery(nn.Module):
    """Many query heads, one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * HEAD_DIM), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """``nn.MultiheadAttention`` as it comes."""

    def __init__(self, batch_first: bool, need_weights: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Masked(Packed):
    """A mask of the model's own: ``masked_fill``, or a boolean or additive mask of fused attention."""

    hidden: Tensor

    def __init__(self, how: str, tokens: int = SIDE * SIDE + 1) -> None:
        super().__init__()
        reach = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
        self.register_buffer("hidden", reach > 20)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.how == "fill":
            scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(self.hidden, float("-inf"))
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if self.how == "causal":
            return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        mask = ~self.hidden if self.how == "boolean" else -3.0 * self.hidden.float()
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class ContentMasked(Packed):
    """A mask that the input decides."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        hidden = (x.mean(-1) > x.mean((1, 2))[:, None] + 0.1)[:, None, None]
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -1e4)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AcrossSamples(Packed):
    """Attention over all tokens of the whole batch: no sample stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)[None]).reshape(x.shape)


class SoftmaxOverQueries(Packed):
    """The softmax runs over the queries, not over the keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(-2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ChannelAttention(Packed):
    """Attention between channels, normalized, as in XCiT."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in self.heads(x))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 4.0).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


class Pooled(nn.Module):
    """Keys and values from an average-pooled map, a class token kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        image = x[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE))
        reduced = torch.cat([x[:, :1], F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)], dim=1)
        k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.kv(reduced).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Selected(Packed):
    """Every query attends to its own best keys only."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * HEAD_DIM**-0.5
        least = scores.topk(8, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Transposed(nn.Module):
    """Gives a mixer its tokens and samples the wrong way round, and turns its result back."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.transpose(0, 1)).transpose(0, 1)
