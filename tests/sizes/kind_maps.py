"""One small model for each way in which windows, reduced maps, sequences and steps of training hang on the size."""

from __future__ import annotations

import math

import torch
from kind_models import Attention, Classifier, MasksItself, Tokens, offsets
from torch import nn
from torch.nn import functional as F

# --- windows that are the whole map at capture ---


class Windows(nn.Module):
    """Windows of 4x4 on a map [b, h, w, c]; ``attended`` takes them as [windows, 16, c]."""

    def __init__(self, dim=16, heads=2, side=4):
        super().__init__()
        self.side, self.inner = side, Attention(dim, heads)

    def attended(self, t):
        return self.inner(t.unflatten(1, (self.side, self.side))).flatten(1, 2)

    def forward(self, x):
        (b, h, w, c), s = x.shape, self.side
        t = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        t = self.attended(t).view(b, h // s, w // s, s, s, c)
        return t.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


class InlineWindows(nn.Module):
    """Projections, windows and attention in one forward."""

    def __init__(self, dim=16, heads=2, side=4):
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        (b, h, w, c), s, heads = x.shape, self.side, self.heads
        n, m = h // s, w // s
        t = x.reshape(b, n, s, m, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b * n * m, s * s, c)
        q, k, v = self.qkv(t).reshape(b * n * m, s * s, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b * n * m, s * s, c)
        return self.out(a).view(b, n, m, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


class ConvWindows(nn.Module):
    """Projections by 1x1 convolutions on the windows' maps."""

    def __init__(self, dim=16, heads=2, side=4):
        super().__init__()
        self.heads, self.side = heads, side
        self.q, self.kv, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        (b, c, h, w), s, heads = x.shape, self.side, self.heads
        n, m = h // s, w // s
        t = x.reshape(b, c, n, s, m, s).permute(0, 2, 4, 1, 3, 5).reshape(b * n * m, c, s, s)
        q, (k, v) = self.q(t), self.kv(t).chunk(2, dim=1)
        q, k, v = (p.reshape(b * n * m * heads, c // heads, s * s).transpose(1, 2) for p in (q, k, v))
        a = (q @ k.transpose(1, 2) * (c // heads) ** -0.5).softmax(-1) @ v
        a = a.reshape(b, n, m, heads, s, s, c // heads).permute(0, 3, 6, 1, 4, 2, 5).reshape(b, c, h, w)
        return self.out(a).permute(0, 2, 3, 1)


class WindowsBySplitting(Windows):
    def forward(self, x):
        s = self.side
        rows = [
            torch.cat([self.attended(cell.flatten(1, 2)).unflatten(1, (s, s)) for cell in row.split(s, 2)], 2)
            for row in x.split(s, 1)
        ]
        return torch.cat(rows, 1)


class WindowsByUnfolding(Windows):
    def forward(self, x):
        (b, h, w, c), s = x.shape, self.side
        t = F.unfold(x.permute(0, 3, 1, 2), s, stride=s).view(b, c, s * s, -1).permute(0, 3, 2, 1).flatten(0, 1)
        t = self.attended(t).view(b, -1, s * s, c).permute(0, 3, 2, 1).reshape(b, c * s * s, -1)
        return F.fold(t, (h, w), s, stride=s).permute(0, 2, 3, 1)


class Grid(Windows):
    """Every n-th token with every n-th: all of them where the map is as large as the grid."""

    def forward(self, x):
        (b, h, w, c), s = x.shape, self.side
        t = x.view(b, s, h // s, s, w // s, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, s * s, c)
        t = self.attended(t).view(b, h // s, w // s, s, s, c)
        return t.permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c)


class ClampedWindows(Windows):
    """A window no larger than the map, shifted only where there are several."""

    def forward(self, x):
        (b, h, w, c), s = x.shape, min(8, *x.shape[1:3])
        shift = s // 2 if min(h, w) > s else 0
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        t = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s, s, c)
        t = self.inner(t).view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return t.roll((shift, shift), (1, 2)) if shift else t


class PaddedWindows(Windows):
    """The map is padded to whole windows, and cut again."""

    def forward(self, x):
        (h, w), s = x.shape[1:3], self.side
        return super().forward(F.pad(x, (0, 0, 0, (s - w % s) % s, 0, (s - h % s) % s)))[:, :h, :w].contiguous()


class LocalKeys(nn.Module):
    """As many keys on all sides as the map at capture has: a band that there takes in everything."""

    def __init__(self):
        super().__init__()
        self.inner = MasksItself(lambda heads, h, w: torch.where(offsets(h, w).abs().amax(-1) <= 3, 0.0, -1e4))

    def forward(self, x):
        return self.inner(x)


WINDOWS = (
    Windows, InlineWindows, ConvWindows, WindowsBySplitting, WindowsByUnfolding, Grid, ClampedWindows, PaddedWindows,
    LocalKeys,
)  # fmt: skip

# --- maps of one cell at capture ---


class Reduced(Tokens):
    """Keys on a map reduced four times (``how``: by a convolution, by pooling, or along rows only)."""

    def __init__(self, how="convolution", dim=16, heads=2):
        super().__init__(nn.Identity())
        self.how, self.heads = how, heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if how == "convolution":
            self.sr, self.norm = nn.Conv2d(dim, dim, 4, 4), nn.LayerNorm(dim)
        if how == "rows":
            self.sr, self.norm = nn.Conv2d(dim, dim, (4, 1), (4, 1)), nn.LayerNorm(dim)

    def through(self, x, h, w):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).permute(0, 2, 1, 3)
        r = x.permute(0, 2, 1).reshape(b, c, h, w)
        if self.how == "pooling":
            r = F.avg_pool2d(r, 4).flatten(2).mT
        elif self.how == "adaptive pooling":
            r = F.adaptive_avg_pool2d(r, (h // 4, w // 4)).reshape(b, c, -1).permute(0, 2, 1)
        else:
            r = self.norm(self.sr(r).reshape(b, c, -1).permute(0, 2, 1))
        k, v = self.kv(r).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((a @ v).transpose(1, 2).reshape(b, n, c))


# --- tokens made a map of sides that the module does not take from its input ---


class WindowsOnTokens(nn.Module):
    """The sides of the map by ``side``: its own attribute, the root of the number of tokens, or what the model set
    before the call. The batch, when windows become a map again, by ``back``."""

    def __init__(self, side="own", back="given", dim=12, heads=2, window=4):
        super().__init__()
        self.side, self.back, self.heads, self.window, self.own = side, back, heads, window, 8
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        h = w = {"own": self.own, "root": int(n**0.5), "exact root": math.isqrt(n)}.get(self.side, 0)
        if self.side == "set before":
            h, w = self.height, self.width
        s, heads = self.window, self.heads
        t = self.norm(x).view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        q, k, v = self.qkv(t).reshape(t.shape[0], s * s, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) * (c // heads) ** -0.5).softmax(-1) @ v
        t = self.out(a.transpose(1, 2).reshape(-1, s * s, c))
        b = {"given": b, "divided": int(t.shape[0] / (h * w / s / s)), "counted": t.numel() // (h * w * c)}.get(
            self.back, -1
        )
        t = t.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return t.reshape(-1, h * w, c)


class Sequence(Tokens):
    """Its attention takes tokens [b, n, c]."""

    def __init__(self, attention=None, dim=16):
        super().__init__(SequenceAttention(dim) if attention is None else attention, dim)

    def through(self, x, h, w):
        return self.attended(x)


class SetsSides(Tokens):
    def through(self, x, h, w):
        self.attn.height, self.attn.width = h, w
        return self.attn(x)


# --- tokens left out in training ---


class LeavesTokensOut(Tokens):
    """A part of the tokens in training, ``how``: by chance, the largest, or every n-th."""

    def __init__(self, how="chance", keep=0.25, dim=16):
        super().__init__(SequenceAttention(dim))
        self.how, self.keep = how, keep

    def mixed(self, x):
        x = x.flatten(2).transpose(1, 2)
        if self.training:
            kept = max(1, int(x.shape[1] * self.keep))
            if self.how == "every n-th":
                x = x[:, :: round(1 / self.keep)]
            else:
                weight = torch.rand(x.shape[:2]) if self.how == "chance" else x.norm(dim=-1)
                chosen = weight.argsort(1, descending=True)[:, :kept]
                x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        return x + self.attended(x)


class SequenceAttention(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).reshape(b, n, c))


# --- other steps of training ---


class RowsAndColumns(Classifier):
    """Attention along rows, then along columns, which the model cuts up before it calls it."""

    def __init__(self, dim=16):
        super().__init__(nn.Identity(), dim)
        self.rows, self.columns = SequenceAttention(dim), SequenceAttention(dim)

    def mixed(self, x):
        b, c, h, w = x.shape
        x = self.rows(x.permute(0, 2, 3, 1).reshape(b * h, w, c)).view(b, h, w, c)
        return self.columns(x.transpose(1, 2).reshape(b * w, h, c)).view(b, w, h, c).transpose(1, 2)


class AuxiliaryInTraining(Classifier):
    """Two outputs in training, one else."""

    def pooled(self, x):
        y = super().pooled(x)
        return (y, self.head(x[:, 0].mean(1))) if self.training else y


class BlockSkippedInTraining(Classifier):
    def mixed(self, x):
        return x.permute(0, 2, 3, 1) if self.training else super().mixed(x)


class NoiseInTraining(Classifier):
    def placed(self, x):
        return x + torch.randn(x.shape) if self.training else x


class NormOfTheBatch(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.BatchNorm2d(16)

    def placed(self, x):
        return self.norm(x)


class SmallerInTraining(Classifier):
    def placed(self, x):
        return F.avg_pool2d(x, 2) if self.training else x


IN_TRAINING = (AuxiliaryInTraining, BlockSkippedInTraining, NoiseInTraining, NormOfTheBatch, SmallerInTraining)
