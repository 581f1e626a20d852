"""Attention over maps with projections that are convolutions of kernel 1, in many spellings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, DIM, WIDTH = 3, 4, 12
PACKINGS = ("3hd", "h3d", "hd3", "separate")
PRODUCTS = ("fused", "matmul", "einsum", "transposed")


class MapAttention(nn.Module):
    """Self-attention of a map ``[batch, channels, height, width]``, or with ``flat`` of ``[batch, channels, tokens]``.

    ``normed`` puts batch norms behind the convolutions; ``turned`` flattens the map column by column; ``mask``
    ``[tokens, tokens]`` says which keys a query sees, for comparison with kernels.
    """

    def __init__(self, packing="3hd", product="fused", bias=True, flat=False, normed=False, turned=False, **options):
        super().__init__()
        convolution = nn.Conv1d if flat else nn.Conv2d
        sizes = (WIDTH,) * 3 if packing == "separate" else (3 * WIDTH,)
        self.inputs = nn.ModuleList(convolution(WIDTH, size, 1, bias=bias, **options) for size in sizes)
        self.norm = nn.BatchNorm2d(3 * WIDTH) if normed else nn.Identity()
        self.proj = convolution(WIDTH, WIDTH, 1, bias=bias)
        self.packing, self.product, self.flat, self.turned = packing, product, flat, turned
        self.mask: Tensor | None = None

    def split(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, ``[batch, heads, dim, tokens]``."""
        parts = [convolution(x) for convolution in self.inputs]
        if self.packing == "separate":
            return [part.flatten(2).unflatten(1, (HEADS, DIM)) for part in parts]
        packed = self.norm(parts[0])
        packed = (packed.transpose(2, 3) if self.turned else packed).flatten(2)
        if self.packing == "3hd":
            return list(packed.reshape(len(x), 3, HEADS, DIM, -1).unbind(1))
        if self.packing == "h3d":
            return list(packed.view(len(x), HEADS, 3 * DIM, -1).chunk(3, dim=2))
        return [packed.unflatten(1, (HEADS, DIM, 3))[:, :, :, part] for part in range(3)]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.product == "fused" and self.mask is None:
            return F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (q, k, v))).transpose(2, 3)
        if self.product == "einsum":
            scores = torch.einsum("bhdi,bhdj->bhij", q, k) / DIM**0.5
        else:
            scores = (q * DIM**-0.5).transpose(-2, -1) @ k
        scores = scores if self.mask is None else scores.masked_fill(~self.mask, -torch.inf)
        weights = scores.softmax(-1)
        if self.product == "einsum":
            return torch.einsum("bhij,bhdj->bhdi", weights, v)
        if self.product == "transposed":
            return v @ weights.transpose(-2, -1)
        return (weights @ v.transpose(2, 3)).permute(0, 1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        mixed = self.mix(*self.split(x.flatten(2) if self.flat else x)).flatten(1, 2)
        if self.turned:
            return self.proj(mixed.view(*shape[:2], shape[3], shape[2]).transpose(2, 3))
        mixed = self.proj(mixed if self.flat else mixed.view(shape))
        return mixed.view(shape) if self.flat else mixed


class MapWindows(nn.Module):
    """Windows of a map, cut after the projections; ``shift`` rolls the projected map."""

    def __init__(self, size=3, shift=0):
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.size, self.shift = size, shift

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows, columns = height // self.size, width // self.size
        blocks = self.qkv(x).view(batch, 3, HEADS, DIM, rows, self.size, columns, self.size)
        q, k, v = blocks.permute(1, 0, 4, 6, 2, 5, 7, 3).reshape(3, -1, HEADS, self.size**2, DIM)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.view(batch, rows, columns, HEADS, self.size, self.size, DIM)
        return self.proj(mixed.permute(0, 3, 6, 1, 4, 2, 5).reshape(x.shape))


class MapReduced(nn.Module):
    """Keys and values of a map of half the sides, one head of them for all queries if ``shared``."""

    def __init__(self, shared=False):
        super().__init__()
        self.heads = 1 if shared else HEADS
        self.q, self.kv = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, 2 * self.heads * DIM, 1)
        self.reduce, self.proj = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(2).unflatten(1, (HEADS, DIM))
        k, v = self.kv(self.reduce(x)).flatten(2).unflatten(1, (2, self.heads, DIM)).unbind(1)
        return self.proj(F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.reshape(x.shape))


class MapModel(nn.Module):
    """One mixer between convolutions that see where every token lies."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH)
        self.mixer, self.after, self.head = mixer, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.mixer(self.norm(x))
        return self.head(self.after(x).relu().mean((2, 3)))


def map_model(mixer: nn.Module | None = None, dtype=torch.float64, **spelling) -> MapModel:
    """In eval mode, with attention that is far from uniform and batch norms that do something."""
    torch.manual_seed(0)
    model = MapModel(MapAttention(**spelling) if mixer is None else mixer).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in model.mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def map_images(batch=2, size=(24, 40), dtype=torch.float64) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
