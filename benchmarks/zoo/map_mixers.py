"""Attention as users write it, on channels-first maps ``[batch, width, side, side]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.token_mixers import HEAD_DIM, HEADS, SIDE, WIDTH, Packed


class ChannelsFirst(nn.Linear):
    """A linear map of the channels of a channels-first map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Shifted windows on a channels-first map, written as einops would."""

    mask: Tensor

    def __init__(self, size: int = 4, shift: int = 0, linear: bool = True) -> None:
        super().__init__()
        self.qkv: nn.Module = ChannelsFirst(WIDTH, 3 * WIDTH) if linear else nn.Conv2d(WIDTH, 3 * WIDTH, 1)
        self.proj: nn.Module = ChannelsFirst(WIDTH, WIDTH) if linear else nn.Conv2d(WIDTH, WIDTH, 1)
        self.bias = nn.Parameter(torch.randn(HEADS, size * size, size * size))
        self.size, self.shift = size, shift
        self.register_buffer("mask", self.shift_mask() if shift else None, persistent=False)

    def shift_mask(self) -> Tensor:
        region = torch.zeros(SIDE)
        region[-self.size : -self.shift] = 1
        region[-self.shift :] = 2
        rows = (3 * region[:, None] + region).view(SIDE // self.size, self.size, SIDE // self.size, self.size)
        blocks = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return torch.where(blocks[:, :, None] == blocks[:, None], 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (2, 3))
        rows, columns = height // self.size, width // self.size
        q, k, v = (
            self.qkv(x)
            .reshape(batch, 3, HEADS, HEAD_DIM, rows, self.size, columns, self.size)
            .permute(1, 0, 4, 6, 2, 5, 7, 3)
            .reshape(3, batch, rows * columns, HEADS, self.size**2, HEAD_DIM)
        )
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5 + self.bias
        if self.shift:
            scores = scores + self.mask[:, None]
        x = (scores.softmax(-1) @ v).reshape(batch, rows, columns, HEADS, self.size, self.size, HEAD_DIM)
        x = x.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, WIDTH, height, width)
        return self.proj(x.roll((self.shift, self.shift), (2, 3)) if self.shift else x)


class Unfolded(nn.Module):
    """Windows, or with ``reach`` overlapping neighborhoods, cut by ``unfold``."""

    def __init__(self, size: int, reach: int = 0) -> None:
        super().__init__()
        self.qkv, self.proj = ChannelsFirst(WIDTH, 3 * WIDTH), ChannelsFirst(WIDTH, WIDTH)
        self.size, self.reach = size, reach

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        q = self.cut(q, 0)
        k, v = self.cut(k, self.reach), self.cut(v, self.reach)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [batch, heads, blocks, places, dim]
        columns = mixed.permute(0, 1, 4, 3, 2).reshape(x.shape[0], WIDTH * self.size**2, -1)
        return self.proj(F.fold(columns, x.shape[2:], self.size, stride=self.size))

    def cut(self, x: Tensor, reach: int) -> Tensor:
        columns = F.unfold(x, self.size + 2 * reach, padding=reach, stride=self.size)
        return columns.unflatten(1, (HEADS, HEAD_DIM, -1)).permute(0, 1, 4, 3, 2)


class MapAttention(nn.Module):
    """Attention over all pixels of a channels-first map with 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        weights = torch.einsum("bhdi,bhdj->bhij", q, k).div(HEAD_DIM**0.5).softmax(-1)
        mixed = torch.einsum("bhij,bhdj->bhdi", weights, v)
        return self.proj(mixed.reshape(x.shape))


class Axial(nn.Module):
    """Attention along the rows, then along the columns, of a channels-first map."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = Packed(), Packed()

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = x.permute(0, 2, 3, 1)
        x = self.rows(x.reshape(batch * height, width, WIDTH)).reshape(batch, height, width, WIDTH)
        x = self.columns(x.transpose(1, 2).reshape(batch * width, height, WIDTH)).reshape(batch, width, height, WIDTH)
        return x.permute(0, 3, 2, 1)
