"""Models whose attention groups tokens that lie at an interval: MaxViT of two libraries, and handwritten ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from random_weights import randomized
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit

Pair = tuple[int, int]
WIDTH, HEADS = 16, 2


class GroupAttention(nn.Module):
    """Attention inside interleaved groups of a channels-last map; padding, where the map needs it, is masked.

    Args:
        indexed: groups are gathered by an index of tokens behind the projection, instead of views in front of it.
    """

    def __init__(self, sides: Pair, group: Pair, interval: Pair, biased: bool = True, indexed: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.group, self.interval, self.indexed = group, interval, indexed
        self.short = [-side % (g * i) for side, g, i in zip(sides, group, interval, strict=True)]
        rows, columns = 2 * group[0] - 1, 2 * group[1] - 1
        self.table = nn.Parameter(torch.randn(rows * columns, HEADS)) if biased else None
        y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, group), indexing="ij"))
        offset = (y[:, None] - y + group[0] - 1) * columns + x[:, None] - x + group[1] - 1
        self.register_buffer("offset", offset, persistent=False)
        members = self.grouped(torch.arange(1, sides[0] * sides[1] + 1).view(1, *sides, 1))[..., 0] - 1
        self.register_buffer("members", members, persistent=False)

    def grouped(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B * groups, n, C]``."""
        x = F.pad(x, (0, 0, 0, self.short[1], 0, self.short[0]))
        batch, height, width, channels = x.shape
        (rows, columns), (down, across) = self.group, self.interval
        x = x.view(batch, height // rows // down, rows, down, width // columns // across, columns, across, channels)
        return x.permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(-1, rows * columns, channels)

    def mapped(self, x: Tensor, sides: Pair) -> Tensor:
        """The inverse of ``grouped``."""
        (rows, columns), (down, across) = self.group, self.interval
        high, wide = ((side + short) // g // i for side, short, g, i in zip(
            sides, self.short, self.group, self.interval, strict=True))  # fmt: skip
        x = x.view(-1, high, down, wide, across, rows, columns, x.shape[-1]).permute(0, 1, 5, 2, 3, 6, 4, 7)
        x = x.reshape(x.shape[0], high * rows * down, wide * columns * across, -1)
        return x[:, : sides[0], : sides[1]]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        indexed = self.indexed
        packed = self.qkv(x).flatten(1, 2)[:, self.members].flatten(0, 1) if indexed else self.qkv(self.grouped(x))
        q, k, v = packed.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.table is not None:
            scores = scores + self.table[self.offset].permute(2, 0, 1)
        if any(self.short):
            mask = x.new_zeros(self.members.shape).masked_fill(self.members < 0, -100.0)
            scores = scores + mask.repeat(batch, 1)[:, None, None]
        mixed = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if not self.indexed:
            return self.mapped(mixed, (height, width))
        order = torch.argsort(self.members.flatten())
        return mixed.unflatten(0, (batch, -1)).flatten(1, 2)[:, order].unflatten(1, (height, width))


class GroupModel(nn.Module):
    """Patches of 4x4 pixels to a map, one attention with a residual, mean, logits."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.mixer = nn.Conv2d(3, WIDTH, 4, 4), nn.LayerNorm(WIDTH), mixer
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).permute(0, 2, 3, 1)
        x = x + self.mixer(self.norm(x))
        return self.head(x.square().mean((1, 2)))


def timm_maxvit() -> nn.Module:
    """Stages of 8x12 and 4x6 tokens in groups of 2x2: at intervals of 4x6 and 2x3."""
    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2), grid_size=(2, 2))
    config = MaxxVitCfg(
        embed_dim=(16, 16), depths=(1, 1), block_type=("M", "M"), stem_width=16, transformer_cfg=attention
    )
    return MaxxVit(config, img_size=(32, 48), num_classes=5)


def torchvision_maxvit() -> nn.Module:
    """Tokens stay group by group from each partition to its end."""
    return MaxVit((64, 64), 16, 4, [16, 16], [1, 1], 8, 0.0, num_classes=5)


def handwritten(sides: Pair, *arguments: Pair, **options: bool) -> Callable[[], nn.Module]:
    return lambda: GroupModel(GroupAttention(sides, *arguments, **options))


# name: (model, image size)
DONORS: dict[str, tuple[Callable[[], nn.Module], Pair]] = {
    "timm": (timm_maxvit, (32, 48)),
    "torchvision": (torchvision_maxvit, (64, 64)),
    "views": (handwritten((8, 12), (4, 3), (2, 4)), (32, 48)),
    "indexed": (handwritten((8, 12), (2, 4), (4, 3), indexed=True), (32, 48)),
    "no bias": (handwritten((8, 6), (4, 6), (2, 1), biased=False), (32, 24)),
    "regions": (handwritten((8, 12), (2, 3), (2, 2)), (32, 48)),
    "padded": (handwritten((7, 10), (2, 2), (2, 3)), (28, 40)),
}
WHOLE = ("timm", "torchvision", "views", "indexed", "no bias")
"""Donors whose groups reach over the map."""


@cache
def donor(name: str) -> nn.Module:
    """In float64 and eval mode, with no trivial weight; shared, so never changed by a test."""
    torch.manual_seed(0)
    return randomized(DONORS[name][0]().double())


def images(name: str, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *DONORS[name][1], generator=generator, dtype=torch.float64)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
