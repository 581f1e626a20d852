"""One small model for each way in which a model can make numbers, positions and masks of its image's size."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


def lively(make, seed=0):
    """The model that ``make`` gives, in float64 and eval mode, with attention far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
            else:
                nn.init.normal_(parameter, 0.5, 0.3)
    return model


class Classifier(nn.Module):
    """A map of patches of 4 pixels, what a subclass does with it, and a head. A plain model as it stands.

    With ``inline``, its attention runs in its own forward, so that all it does itself stands beside the attention.
    """

    def __init__(self, attention=None, dim=16, inline=False):
        super().__init__()
        self.inline, self.stem, self.head = inline, nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, 5)
        self.attn = Attention(dim) if attention is None else attention

    def forward(self, x):
        return self.pooled(self.mixed(self.placed(self.stem(x))))

    def placed(self, x):
        return x

    def mixed(self, x):
        x = x.permute(0, 2, 3, 1)
        return x + self.attended(x)

    def attended(self, *given):
        return (self.attn.forward if self.inline else self.attn)(*given)

    def pooled(self, x):
        return self.head(x.mean((1, 2)))


class Attention(nn.Module):
    """Attention on a map [b, h, w, c]; subclasses change its scale, mask, queries or values."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = self.scored(q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5, b, h, w)
        if mask is not None:
            scores = scores + mask
        return self.out(self.valued(scores.softmax(-1) @ v, h, w).transpose(1, 2).reshape(b, h, w, c))

    def scored(self, scores, b, h, w):
        return scores

    def valued(self, values, h, w):
        return values


class Tokens(Classifier):
    """The same with tokens between its blocks."""

    def mixed(self, x):
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return x + self.through(x, h, w)

    def through(self, x, h, w):
        return self.attended(x.unflatten(1, (h, w))).flatten(1, 2)

    def pooled(self, x):
        return self.head(x.mean(1))


# --- numbers and positions that come from the size, beside the attention ---


class SincosPositions(Classifier):
    def placed(self, x):
        b, c, h, w = x.shape
        y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        o = 1.0 / 50 ** (torch.arange(c // 4) / 3)
        p = torch.cat([f(g.flatten()[:, None] * o) for g in (y, z) for f in (torch.sin, torch.cos)], 1)
        return (x.flatten(2).transpose(1, 2) + p).transpose(1, 2).reshape(b, c, h, w)


class KeptPositions(Classifier):
    """Made once a size and kept."""

    def __init__(self, **options):
        super().__init__(**options)
        self.made = {}

    def placed(self, x):
        size = tuple(x.shape[2:])
        if size not in self.made:
            self.made[size] = torch.cos(torch.arange(math.prod(size)) * 0.7).view(size)
        return x + self.made[size]


class ResizedPositions(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.positions = nn.Parameter(torch.randn(1, 16, 4, 4))

    def placed(self, x):
        table = self.positions
        if x.shape[2:] != table.shape[2:]:
            table = F.interpolate(table, size=x.shape[2:], mode="bilinear", align_corners=False)
        return x + table


class Ramp(Classifier):
    def placed(self, x):
        return x + torch.linspace(-1, 1, x.shape[-1])


class UpperHalf(Classifier):
    def placed(self, x):
        return x[:, :, : x.shape[2] // 2]


class SecondHalf(Tokens):
    def mixed(self, x):
        x = super().mixed(x)
        return x[:, x.shape[1] // 2 :]


class LowerQuarter(Classifier):
    def placed(self, x):
        return x.narrow(2, x.size(2) // 2, x.size(2) - x.size(2) // 2)


class RolledByHalf(Classifier):
    def placed(self, x):
        return x + 0.5 * torch.roll(x, (x.shape[2] // 2, -(x.shape[3] // 2)), (2, 3))


class FlippedInParts(Classifier):
    """Rows in as many parts as the sides have a common divisor: few looks do not tell that number, but the batch."""

    def placed(self, x):
        b, c, h, w = x.shape
        parts = math.gcd(h, w)
        return x.view(b, c, parts, h // parts, w).flip(2).reshape(x.shape)


class DoubledWhenLarge(Classifier):
    def placed(self, x):
        return x * 2 if x.shape[2] > 5 else x


class PooledWhileLarge(Classifier):
    def placed(self, x):
        while x.shape[-1] > 6:
            x = F.avg_pool2d(x, 2)
        return x


class TransposedWhenWide(Classifier):
    def placed(self, x):
        return x.mT if x.shape[3] > x.shape[2] else x


class WeighedRowByRow(Classifier):
    def placed(self, x):
        return torch.stack([row * (1 + 0.2 * i) for i, row in enumerate(x.unbind(2))], 2)


class PaddedToFour(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def placed(self, x):
        h, w = x.shape[2:]
        return self.mix(F.pad(x, (0, -w % 4, 0, -h % 4), value=0.5))[:, :, :h, :w]


class MeanByHand(Classifier):
    def pooled(self, x):
        return self.head(x.sum((1, 2)) / (x.shape[1] * x.shape[2]))


class MeanByFactor(Classifier):
    def pooled(self, x):
        return self.head(x.sum((1, 2)) * (1.0 / x[0, ..., 0].numel()))


class MeanByTensor(Classifier):
    def pooled(self, x):
        return self.head(x.sum((1, 2)) / torch.tensor(float(x.shape[1] * x.shape[2])))


class BatchScaled(Classifier):
    def pooled(self, x):
        return super().pooled(x) / len(x)


POSITIONS_AND_NUMBERS = (
    SincosPositions, KeptPositions, ResizedPositions, Ramp, UpperHalf, SecondHalf, LowerQuarter, RolledByHalf,
    DoubledWhenLarge, PooledWhileLarge, TransposedWhenWide, WeighedRowByRow, PaddedToFour, MeanByHand, MeanByFactor,
    MeanByTensor, BatchScaled,
)  # fmt: skip

# --- the same inside the attention ---


class ScaledByLogLength(Attention):
    def scored(self, scores, b, h, w):
        return scores * math.log(h * w)


class ScaledByLogTensor(Attention):
    def scored(self, scores, b, h, w):
        return scores * torch.tensor(scores.shape[-1], dtype=torch.float64).log()


class ScaledByRatio(Attention):
    def scored(self, scores, b, h, w):
        return scores * (h * w / 16)


class TripledWhenLong(Attention):
    def scored(self, scores, b, h, w):
        if h * w > 16:
            scores = scores * 3
        return scores


class TripledWhenUnusedIsLong(Attention):
    """Of what decides it only the size is asked for: the exported graph does not hold the tensor."""

    limit = 8

    def scored(self, scores, b, h, w):
        return scores * 3 if scores.new_ones(h * w // 2).shape[0] > self.limit else scores


class ScaledByUnusedLength(Attention):
    def scored(self, scores, b, h, w):
        return scores / scores.new_ones(h, w)[1:, 1:].flatten().shape[0] ** 0.5


class TripledWhenOblong(Attention):
    def scored(self, scores, b, h, w):
        return scores * (3 if h != w else 1)


class TripledInLargeBatches(Attention):
    def scored(self, scores, b, h, w):
        return scores * 3 if b * h * w > 40 else scores


class ValuesOverLength(Attention):
    def valued(self, values, h, w):
        return 10 * values / values.shape[-2] ** 0.5


class HalvesOfValues(Attention):
    def valued(self, values, h, w):
        n = h * w
        return torch.cat([values[:, :, n // 2 :], values[:, :, : n // 2]], 2)


class WithoutValuesInTraining(Attention):
    def valued(self, values, h, w):
        return values * 0 if self.training else values


class HeadsDroppedInTraining(Attention):
    def valued(self, values, h, w):
        if not self.training:
            return values
        keep = torch.ones(self.heads, 1, 1)
        keep[0] = 0
        return values * keep


IN_ATTENTION = (
    ScaledByLogLength, ScaledByLogTensor, ScaledByRatio, TripledWhenLong, TripledWhenOblong, TripledInLargeBatches,
    TripledWhenUnusedIsLong, ScaledByUnusedLength,
    ValuesOverLength, HalvesOfValues, WithoutValuesInTraining, HeadsDroppedInTraining,
)  # fmt: skip

# --- masks made from the size ---


def offsets(h, w):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([y, x], -1).reshape(-1, 2)
    return places[:, None] - places[None]


def decay_by_offsets(heads, h, w):
    return -offsets(h, w).abs().sum(-1) * torch.linspace(0.2, 0.8, heads)[:, None, None]


def decay_by_distances(heads, h, w):
    places = torch.cartesian_prod(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64))
    return -0.7 * torch.cdist(places, places)


def slopes_on_the_sequence(heads, h, w):
    return -(torch.arange(h * w)[:, None] - torch.arange(h * w)).abs() * 2.0 ** -torch.arange(heads)[:, None, None]


def rows_only(heads, h, w):
    rows = torch.arange(h * w) // w
    return torch.where(rows[:, None] == rows, 0.0, -1e4)


def lower_triangle(heads, h, w):
    return torch.full((h * w, h * w), -1e4).triu(1)


def rows_and_columns_apart(heads, h, w):
    """A decay along rows beside one along columns, put together by repetition."""
    down = -(torch.arange(h)[:, None] - torch.arange(h)).abs() * 0.3
    along = -(torch.arange(w)[:, None] - torch.arange(w)).abs() * 0.5
    return (down[:, None, :, None] + along[None, :, None, :]).reshape(h * w, h * w)


def first_keys_of_a_list(heads, h, w):
    return torch.tensor([0.0 if i < h * w // 2 else -2.0 for i in range(h * w)])


MASKS = (
    decay_by_offsets, decay_by_distances, slopes_on_the_sequence, rows_only, lower_triangle, rows_and_columns_apart,
    first_keys_of_a_list,
)  # fmt: skip


class MasksItself(Attention):
    def __init__(self, mask, **options):
        super().__init__(**options)
        self.mask = mask

    def scored(self, scores, b, h, w):
        return scores + self.mask(self.heads, h, w)


class GivesAMask(Classifier):
    def __init__(self, mask, **options):
        super().__init__(**options)
        self.mask = mask

    def mixed(self, x):
        x = x.permute(0, 2, 3, 1)
        return x + self.attended(x, self.mask(2, *x.shape[1:3]))
