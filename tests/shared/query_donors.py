"""Models in which a part of the tokens query, or queries are learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import timm
import torch
import torch.nn.functional as F
from random_weights import randomized
from torch import Tensor, nn

WIDTH, HEADS = 24, 3


class ReadOut(nn.Module):
    """The first tokens, class and distillation token, query all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x[:, : self.count]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Pooling(nn.Module):
    """Learned queries pool the tokens, and an MLP follows, as in SigLIP; ``spread`` says how the batch gets them."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.q, self.kv, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        latent = self.latent.repeat(batch, 1, 1) if self.spread == "repeat" else self.latent.expand(batch, -1, -1)
        q = self.q(latent).reshape(batch, 2, HEADS, WIDTH // HEADS).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, x.shape[1], 2, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if self.spread == "repeat":
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        x = mixed.transpose(1, 2).reshape(batch, 2, WIDTH)
        return x + self.mlp(self.norm(x))


class QueryModel(nn.Module):
    """Patches, a prefix, a read-out or pooling, logits."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.reader = nn.Conv2d(3, WIDTH, 8, 8), nn.LayerNorm(WIDTH), reader
        self.first = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.reader(self.norm(x)).square().mean(1))


DONORS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cait": (
        lambda: timm.create_model("cait_xxs24_224", img_size=64, depth=1, embed_dim=24, num_heads=3, num_classes=5), 64,
    ),
    "crossvit": (lambda: timm.create_model("crossvit_9_240", depth=((1, 1, 0),), num_classes=5), 240),
    "two queries": (lambda: QueryModel(ReadOut(2)), 32),
    "siglip": (
        lambda: timm.create_model(
            "vit_base_patch16_siglip_224", img_size=64, depth=1, embed_dim=24, num_heads=3, num_classes=5
        ), 64,
    ),
    "pooling, expanded": (lambda: QueryModel(Pooling("expand")), 32),
    "pooling, repeated": (lambda: QueryModel(Pooling("repeat")), 32),
}  # fmt: skip


@cache
def query_donor(name: str) -> nn.Module:
    """In float64 and eval mode, with no trivial weight; shared, so never changed by a test."""
    torch.manual_seed(0)
    return randomized(DONORS[name][0]().double())


def query_images(name: str, batch: int = 1) -> Tensor:
    side = DONORS[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
