"""Small classifiers that use their input's size, batch and mode in ways drawn by chance, told by one-line recipes.

By hand, from this folder: ``build(Recipe(block="windows", steps=(Step("map", "padded"),)))`` gives the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.nn import functional as F

# --- what a model computes from its sizes: `x` is the tensor at hand, `b, h, w` the batch and the sides of its map ---

NUMBERS = (
    "h * w", "(h * w) ** 0.5", "int(math.sqrt(h * w))", "math.isqrt(h * w)", "math.log(h * w)", "(h * w) // 2",
    "-(h * w) % 3", "-h % 3", "max(h, w)", "min(h, w)", "h / w", "16 / (h * w)", "h // 2 + w % 3", "x.numel() // 64",
    "x.shape[-2:].numel()", "x.size(1)", "x.size(-2)", "len(x)", "b", "b * h", "sum(range(h))",
    "math.prod(x.shape[1:])", "2 if self.training else 1", "1.5 if h > 5 else 1", "3 if h != w else 1", "h - w + 5",
    "abs(h - w)", "min(4, h, w)", "len([i for i in range(h) if i % 2])", "round(w / 3)", "divmod(h * w, 5)[1]",
    "x.stride(0) // 16", "h.bit_length()",
)  # fmt: skip
CONDITIONS = (
    "h > 5", "w <= 4", "h * w > 16", "(h * w) % 2", "h != w", "h > w", "b * h * w > 40", "b > 1", "self.training",
    "not self.training", "(h, w) == (4, 4)", "h in (4, 8)", "h % 4 == 0 and w % 4 == 0", "x.numel() >= 1024",
    "int((h * w) ** 0.5) ** 2 != h * w", "x.shape[0] == 1", "x.size(-2) > 8", "self.training and h > 4", "h * w < 12",
)  # fmt: skip
FORMULAS = {text: eval(f"lambda self, x, b, h, w: {text}", {"math": math}) for text in NUMBERS + CONDITIONS}

# --- what it does with such a number, on any tensor ---


def times(self, x, k):
    return x * (0.1 * k + 0.2)


def plus(self, x, k):
    return x + 0.1 * k


def over(self, x, k):
    return x / k if k else x


def times_a_tensor(self, x, k):
    return x * torch.tensor(0.1 * float(k) + 0.2)


def plus_a_full_row(self, x, k):
    return x + torch.full(x.shape[-1:], 0.1 * float(k))


def rolled_by(self, x, k):
    return torch.roll(x, int(k) % 4, -1)


def repeated(self, x, k):
    for _ in range(int(k) % 4):
        x = x + 0.5 * torch.tanh(x)
    return x


def shrunk_while(self, x, k):
    while k > 1.5:
        x, k = x * 0.8, k / 2
    return x


def clamped_at(self, x, k):
    return x.clamp(max=0.1 * float(k))


def rows_weighted(self, x, k):
    return x * torch.linspace(0.5, 0.5 + 0.1 * float(k), x.shape[-2])[:, None]


def plus_a_cell_of_table(self, x, k):
    return x + self.gain[int(k) % len(self.gain)]


def doubled_if(self, x, k):
    return x * 2 if k else x


def flipped_if(self, x, k):
    if k:
        x = x.flip(-2)
    return x


def squashed_if(self, x, k):
    return torch.tanh(x) if k else torch.relu(x)


def gained_if(self, x, k):
    if not k:
        return x
    return x * self.gain[0]


USES = {use.__name__: use for use in (times, plus, over, times_a_tensor, plus_a_full_row, rolled_by, repeated,
        shrunk_while, clamped_at, rows_weighted, plus_a_cell_of_table)}  # fmt: skip
BRANCHES = {use.__name__: use for use in (doubled_if, flipped_if, squashed_if, gained_if)}

# --- steps on a map [b, c, h, w] ---


def coordinates(h, w):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return y.flatten(), x.flatten()


def sincos(self, x, b, h, w):
    c = x.shape[1]
    y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    o = 1.0 / 100 ** (torch.arange(c // 4) / 3)
    p = torch.cat([f(g.flatten()[:, None] * o) for g in (y, z) for f in (torch.sin, torch.cos)], 1)
    return (x.flatten(2).transpose(1, 2) + p).transpose(1, 2).reshape(x.shape)


def linspace_coordinates(self, x, b, h, w):
    rows, columns = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    return x + (rows * columns) * self.gain[:, None, None]


def kept_positions(self, x, b, h, w):
    if (h, w) not in self.cache:
        y, z = coordinates(h, w)
        self.cache[h, w] = torch.sin(y + 0.5 * z).view(1, 1, h, w)
    return x + self.cache[h, w]


def remembered_positions(self, x, b, h, w):
    if self.cache.get("size") != (h, w):
        self.cache["size"] = (h, w)
        self.cache["rows"] = torch.cos(torch.arange(h, dtype=torch.float64)).view(1, 1, h, 1)
    return x * (1 + self.cache["rows"])


def table_interpolated(self, x, b, h, w):
    return x + F.interpolate(self.table, size=(h, w), mode="bilinear", align_corners=False)


def table_interpolated_if_other(self, x, b, h, w):
    table = self.table
    if table.shape[-2:] != x.shape[-2:]:
        table = F.interpolate(table, size=x.shape[-2:], mode="bicubic")
    return x + table


def table_scaled(self, x, b, h, w):
    return x + F.interpolate(self.table, scale_factor=(h / 4, w / 4), mode="nearest")[:, :, :h, :w]


def table_cut(self, x, b, h, w):
    return x + F.interpolate(self.table, scale_factor=4)[:, :, :h, :w]


def table_repeated(self, x, b, h, w):
    return x + self.table.repeat(1, 1, -(-h // 4), -(-w // 4))[:, :, :h, :w]


def table_cut_from_the_middle(self, x, b, h, w):
    top, left = (16 - h) // 2, (16 - w) // 2
    return x + F.interpolate(self.table, scale_factor=4)[..., top : top + h, left : left + w]


def grid_sampled(self, x, b, h, w):
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, w), torch.linspace(-0.8, 0.8, h), indexing="xy"), -1)
    return x + F.grid_sample(self.table, grid.to(x)[None], align_corners=True)


def padded(self, x, b, h, w):
    """Nothing to pad on the maps of 4x4 and 8x8 that most are captured on."""
    x = F.pad(x, (0, -w % 4, 0, -h % 4))
    return self.conv(x)[:, :, :h, :w]


def padded_to_three(self, x, b, h, w):
    x = F.pad(x, (0, (3 - w % 3) % 3, 0, (3 - h % 3) % 3), value=0.5)
    return self.conv(x)[..., :h, :w].contiguous()


def padded_if_needed(self, x, b, h, w):
    if h % 2 or w % 2:
        x = F.pad(x, (0, w % 2, 0, h % 2), mode="replicate")
    return F.max_pool2d(x, 2)


def cut_to_even(self, x, b, h, w):
    return x[:, :, : h // 2 * 2, : w // 2 * 2]


def upper_half(self, x, b, h, w):
    return x[:, :, : h // 2]


def lower_right(self, x, b, h, w):
    return x[..., h // 3 :, w - w // 2 :]


def square_from_the_middle(self, x, b, h, w):
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return x[:, :, top : top + side, left : left + side]


def rolled(self, x, b, h, w):
    return torch.roll(x, (-(h // 2), w // 3), (2, 3)) + 0.5 * x


def centred_by_hand(self, x, b, h, w):
    return x - x.sum((2, 3), keepdim=True) / (h * w)


def centred_by_factor(self, x, b, h, w):
    return x - x.sum((2, 3), keepdim=True) * (1 / x.shape[-2:].numel())


def rows_by_hand(self, x, b, h, w):
    return torch.stack([x[:, :, i] * (1 + 0.1 * i) for i in range(h)], 2)


def rows_split(self, x, b, h, w):
    upper, lower = x.split([h // 2, h - h // 2], dim=2)
    return torch.cat([lower, upper], 2)


def rows_joined_pairwise(self, x, b, h, w):
    rows = x.unbind(2)
    return torch.stack([one + 0.3 * rows[-1 - i] for i, one in enumerate(rows)], 2)


def columns_running(self, x, b, h, w):
    kept, out = 0, []
    for i in range(w):
        kept = 0.5 * kept + x[..., i]
        out.append(kept)
    return torch.stack(out, -1)


def shrunk_and_back(self, x, b, h, w):
    small = F.interpolate(x, size=(max(h // 2, 1), max(w // 2, 1)), mode="bilinear", align_corners=False)
    return x + F.interpolate(small, size=(h, w))


def pooled_and_back(self, x, b, h, w):
    return x + F.interpolate(F.adaptive_avg_pool2d(x, (-(-h // 2), -(-w // 2))), size=x.shape[2:])


def grown_by_factor(self, x, b, h, w):
    return F.interpolate(x, scale_factor=1.5, mode="nearest") if h * w <= 16 else x


def pooled_to_fixed(self, x, b, h, w):
    return F.adaptive_avg_pool2d(x, 4)


def pooled_by_ratio(self, x, b, h, w):
    return F.avg_pool2d(x, (max(h // 4, 1), max(w // 4, 1)))


def pooled_while_large(self, x, b, h, w):
    while min(x.shape[-2:]) > 6:
        x = F.max_pool2d(x, 2)
    return x


def to_shuffled_pixels(self, x, b, h, w):
    c = x.shape[1]
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c, 4, -1, w // 2)
    return x.sum(2) + x[:, :, 1] * 0.5


def constant_rows(self, x, b, h, w):
    ramp = torch.zeros(b, 1, h, w)
    ramp[:, :, : h // 2] = 1
    return x + ramp * self.gain[:, None, None]


def border_added(self, x, b, h, w):
    mask = x.new_zeros(h, w)
    mask[0], mask[-1], mask[:, 0], mask[:, -1] = 1, 1, 1, 1
    return x * (1 - 0.5 * mask)


def diagonal_added(self, x, b, h, w):
    return x + torch.eye(h, w) * self.gain[:, None, None]


def convolved(self, x, b, h, w):
    return self.conv(x)


def transposed_if_wide(self, x, b, h, w):
    return x.transpose(2, 3) if w > h else x


def batch_normed(self, x, b, h, w):
    return self.norm(x)


def scaled_in_training(self, x, b, h, w):
    return x * (1 + 0.5 * self.training)


def noise_in_training(self, x, b, h, w):
    if self.training:
        x = x + torch.linspace(-1, 1, h * w).view(h, w)
    return x


def squares_hidden_in_training(self, x, b, h, w):
    if self.training:
        keep = torch.ones(h, w)
        keep[h // 4 : h // 2, w // 4 : w // 2] = 0
        x = x * keep * (h * w / keep.sum())
    return x


def channels_by_chance(self, x, b, h, w):
    if self.training:
        x = x * (torch.rand(b, x.shape[1], 1, 1) < 0.7) / 0.7
    return x


MAP_STEPS = {step.__name__: step for step in (
    sincos, linspace_coordinates, kept_positions, remembered_positions, table_interpolated, table_interpolated_if_other,
    table_scaled, table_cut, table_repeated, table_cut_from_the_middle, grid_sampled, padded, padded_to_three,
    padded_if_needed, cut_to_even, upper_half, lower_right, square_from_the_middle, rolled, centred_by_hand,
    centred_by_factor, rows_by_hand, rows_split, rows_joined_pairwise, columns_running, shrunk_and_back,
    pooled_and_back, grown_by_factor, pooled_to_fixed, pooled_by_ratio, pooled_while_large, to_shuffled_pixels,
    constant_rows, border_added, diagonal_added, convolved, transposed_if_wide, batch_normed, scaled_in_training,
    noise_in_training, squares_hidden_in_training, channels_by_chance,
)}  # fmt: skip

# --- steps on tokens [b, h * w, c] ---


def table_of_first_tokens(self, x, b, h, w):
    return x + self.tokens[:, : x.shape[1]]


def table_wrapped(self, x, b, h, w):
    return x + self.tokens[:, torch.arange(x.shape[1]) % 16]


def table_resized(self, x, b, h, w):
    n, side = self.tokens.shape[1], math.isqrt(self.tokens.shape[1])
    if n == h * w and h == w:
        return x + self.tokens
    table = self.tokens.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return x + F.interpolate(table, size=(h, w), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)


def arange_positions(self, x, b, h, w):
    return x + torch.arange(x.size(1)).unsqueeze(-1) / x.size(1) * self.gain


def registers_of_a_batch(self, x, b, h, w):
    extra = self.gain.view(1, 1, -1).expand(b, -1, -1)
    return (torch.cat([extra, x], 1) * 0.9)[:, 1:]


def depthwise_on_map(self, x, b, h, w):
    n, c = x.shape[1:]
    return x + self.conv(x.transpose(1, 2).view(b, c, h, w)).view(b, c, n).transpose(1, 2)


def depthwise_unflattened(self, x, b, h, w):
    return x + self.conv(x.mT.unflatten(-1, (h, w))).flatten(-2).mT


def depthwise_on_root(self, x, b, h, w):
    side = int(x.shape[1] ** 0.5)
    return x + self.conv(x.transpose(1, 2).reshape(*x.shape[::2], side, side)).flatten(2).transpose(1, 2)


def half_rolled(self, x, b, h, w):
    return torch.roll(x, x.shape[1] // 2, 1) + 0.5 * x


def halves_swapped(self, x, b, h, w):
    one, two = x[:, : h * w // 2], x[:, h * w // 2 :]
    return torch.cat([two, one], dim=1)


def chunks_mixed(self, x, b, h, w):
    one, two = x.chunk(2, dim=1)
    return torch.cat([one + two.mean(1, keepdim=True), two], 1)


def global_sum(self, x, b, h, w):
    return x + x.sum(1, keepdim=True) / x.shape[1]


def running_sum(self, x, b, h, w):
    return x.cumsum(1) / torch.arange(1, h * w + 1)[:, None]


def rows_averaged(self, x, b, h, w):
    return x + x.reshape(b, h, w, -1).mean(2).repeat_interleave(w, 1)


def sorted_top(self, x, b, h, w):
    top = x.norm(dim=-1).topk(max(x.shape[1] // 2, 1), dim=1).indices
    return x + x.gather(1, top[..., None].expand(-1, -1, x.shape[-1])).mean(1, keepdim=True)


def token_noise_in_training(self, x, b, h, w):
    return x + 0.3 * torch.sin(torch.arange(x.shape[1]))[:, None] if self.training else x


def tokens_hidden_in_training(self, x, b, h, w):
    return x * (torch.arange(x.shape[1]) % 3 != 0)[:, None] if self.training else x


def sample_by_chance(self, x, b, h, w):
    if not self.training:
        return x
    return x * torch.rand(b, 1, 1).mul(2).floor()


TOKEN_STEPS = {step.__name__: step for step in (
    table_of_first_tokens, table_wrapped, table_resized, arange_positions, registers_of_a_batch, depthwise_on_map,
    depthwise_unflattened, depthwise_on_root, half_rolled, halves_swapped, chunks_mixed, global_sum, running_sum,
    rows_averaged, sorted_top, token_noise_in_training, tokens_hidden_in_training, sample_by_chance,
)}  # fmt: skip


# --- steps that leave other tokens than a map: for global attention on tokens alone ---


def every_other_in_training(self, x, b, h, w):
    return x[:, ::2] if self.training else x


def largest_in_training(self, x, b, h, w):
    if self.training:
        kept = x.square().sum(-1).argsort(1, descending=True)[:, : h * w // 4]
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    return x


def some_by_chance(self, x, b, h, w):
    if self.training:
        kept = torch.rand(b, x.shape[1]).argsort(1)[:, : max(1, int(x.shape[1] * 0.25))]
        x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
    return x


def upper_half_of_tokens(self, x, b, h, w):
    return x[:, : x.shape[1] // 2]


def without_the_first(self, x, b, h, w):
    return x[:, 1:]


def largest_half(self, x, b, h, w):
    kept = x.square().sum(-1).topk(x.shape[1] // 2, 1).indices
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))


def merged_pairs(self, x, b, h, w):
    if x.shape[1] % 2:
        x = torch.cat([x, x[:, -1:]], 1)
    return x.reshape(b, x.shape[1] // 2, 2, -1).mean(2)


def padded_tokens(self, x, b, h, w):
    return F.pad(x, (0, 0, 0, -x.shape[1] % 5), value=0.3)


TOKEN_CUTS = {step.__name__: step for step in (
    every_other_in_training, largest_in_training, some_by_chance, upper_half_of_tokens, without_the_first, largest_half,
    merged_pairs, padded_tokens,
)}  # fmt: skip

# --- masks for scores [.., h * w, h' * w'] ---


def distances(h, w, kh, kw):
    (y, x), (ky, kx) = coordinates(h, w), coordinates(kh, kw)
    return (y[:, None] - ky * (h // kh)).abs(), (x[:, None] - kx * (w // kw)).abs()


def decay(self, heads, h, w, kh, kw):
    dy, dx = distances(h, w, kh, kw)
    return -(dy + dx) * torch.linspace(0.2, 0.8, heads)[:, None, None]


def decay_of_all_heads(self, heads, h, w, kh, kw):
    dy, dx = distances(h, w, kh, kw)
    return -0.5 * (dy.square() + dx.square()).to(torch.float64).sqrt()


def decay_relative(self, heads, h, w, kh, kw):
    dy, dx = distances(h, w, kh, kw)
    return -3 * (dy / h + dx / w)


def alibi(self, heads, h, w, kh, kw):
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return -(torch.arange(h * w)[:, None] - torch.arange(kh * kw)[None]).abs() * slopes[:, None, None]


def causal(self, heads, h, w, kh, kw):
    return torch.ones(h * w, kh * kw, dtype=torch.bool).tril()


def near(self, heads, h, w, kh, kw):
    dy, dx = distances(h, w, kh, kw)
    return (dy <= 2) & (dx <= max(2, kw // 4))


def first_half_of_keys(self, heads, h, w, kh, kw):
    n = kh * kw
    return (torch.arange(n) < (n + 1) // 2).expand(h * w, n)


def same_row(self, heads, h, w, kh, kw):
    return torch.arange(h * w)[:, None] // w % kh == torch.arange(kh * kw) // kw


def table_of_offsets(self, heads, h, w, kh, kw):
    dy, dx = distances(h, w, kh, kw)
    return self.offsets[dy.clamp(max=15), dx.clamp(max=15)]


def table_of_offsets_resized(self, heads, h, w, kh, kw):
    table = F.interpolate(self.offsets[None, None], size=(h, w), mode="bilinear")[0, 0]
    dy, dx = distances(h, w, kh, kw)
    return table[dy, dx]


def last_key_hidden(self, heads, h, w, kh, kw):
    mask = torch.zeros(h * w, kh * kw, dtype=torch.float64)
    mask[:, kh * kw - 1] = -1e4
    return mask


MASKS = {mask.__name__: mask for mask in (
    decay, decay_of_all_heads, decay_relative, alibi, causal, near, first_half_of_keys, same_row, table_of_offsets,
    table_of_offsets_resized, last_key_hidden,
)}  # fmt: skip

# --- steps on the image ---


def image_padded(self, x, b, h, w):
    return F.pad(x, (0, (8 - w % 8) % 8, 0, (8 - h % 8) % 8))


def image_cut(self, x, b, h, w):
    return x[:, :, : h - h % 8, : w - w % 8]


def image_halved(self, x, b, h, w):
    return F.interpolate(x, scale_factor=0.5, mode="bilinear") if h * w > 400 else x


def image_squared(self, x, b, h, w):
    return F.interpolate(x, size=(max(h, w), max(h, w))) if h != w else x


def image_standardised(self, x, b, h, w):
    mean = x.sum((1, 2, 3), keepdim=True) / (3 * h * w)
    return (x - mean) / (((x - mean) ** 2).sum((1, 2, 3), keepdim=True) / x[0].numel()).sqrt()


def image_flipped_in_training(self, x, b, h, w):
    return x.flip(-1) if self.training else x


IMAGE_STEPS = {step.__name__: step for step in (
    image_padded, image_cut, image_halved, image_squared, image_standardised, image_flipped_in_training,
)}  # fmt: skip

STRUCTURAL = {"image": IMAGE_STEPS, "map": MAP_STEPS, "tokens": TOKEN_STEPS | TOKEN_CUTS}
STRUCTURAL |= {"mask": MASKS, "given mask": MASKS}
"""The steps that use no number, by place: in the stem, on the map before or between blocks, at a block's input, and for
scores, made in the attention or given to it. Steps with a number stand there too, and at "queries", "values", "scale",
"attended" in the attention, and at "logits"."""


@dataclass(frozen=True)
class Step:
    """A named step at a place; for those that use a number or a condition, with its formula."""

    place: str
    name: str
    formula: str = ""

    def __repr__(self):
        return f"Step({', '.join(repr(value) for value in (self.place, self.name, self.formula) if value)})"


STEMS = ("conv", "two convs", "conv padded", "patches by reshape", "patches by unfold")
BLOCKS = ("tokens", "map", "conv map", "windows", "windows on tokens", "rows", "reduced", "reduced by pooling")
CORES = ("matmul", "sdpa", "einsum", "bmm")
SPLITS = ("reshape", "view", "unflatten", "fused", "fused view")
SIZES = ("arguments", "tuple", "dict", "root", "isqrt", "attributes", "resolution")
SHELLS = ("modules", "block", "net")
POOLS = ("mean", "sum over n", "sum by factor", "max", "class token", "tokens after class", "first", "middle",
         "weighted", "pooled map", "with auxiliary in training", "upper rows")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All choices of a model; what is left at its default is not printed."""

    image: tuple[int, int] = (16, 16)
    patch: int = 4
    dim: int = 16
    heads: int = 2
    stem: str = "conv"
    block: str = "tokens"
    blocks: int = 1
    core: str = "matmul"
    split: str = "reshape"
    sizes: str = "arguments"
    shell: str = "modules"
    window: int = 4
    clamped: bool = False
    padded: bool = True
    shift: str = ""
    batch: str = "b"
    mlp: bool = False
    skipping: str = ""
    pool: str = "mean"
    seed: int = 0
    steps: tuple[Step, ...] = field(default=())

    def __repr__(self):
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = [f"{f.name}={given[f.name]!r}" for f in fields(self) if given[f.name] != f.default]
        return f"Recipe({', '.join(changed)})"

    def at(self, place):
        return [step for step in self.steps if step.place == place]


class Steps(nn.Module):
    """Steps one after the other; holds only the weights that they use."""

    def __init__(self, steps, dim):
        super().__init__()
        self.functions = [
            STRUCTURAL["map" if step.place == "between" else step.place][step.name] if not step.formula
            else using((USES | BRANCHES)[step.name], FORMULAS[step.formula])
            for step in steps
        ]  # fmt: skip
        used = {name for function in self.functions for name in names_in(function)}
        if "gain" in used:
            self.gain = nn.Parameter(torch.rand(dim) + 0.5)
        if "table" in used:
            self.table = nn.Parameter(torch.randn(1, dim, 4, 4))
        if "tokens" in used:
            self.tokens = nn.Parameter(torch.randn(1, 16 if "isqrt" in used else 256, dim))
        if "offsets" in used:
            self.offsets = nn.Parameter(torch.randn(16, 16))
        if "conv" in used:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if "norm" in used:
            self.norm = nn.BatchNorm2d(dim)
            self.norm.running_mean.normal_()
        if "cache" in used:
            self.cache = {}

    def forward(self, x, b, h, w):
        for function in self.functions:
            x = function(self, x, b, h, w)
        return x

    def masks(self, heads, h, w, kh, kw):
        return [function(self, heads, h, w, kh, kw) for function in self.functions]

    def on_map(self, x):
        for function in self.functions:
            x = function(self, x, len(x), *x.shape[2:])
        return x


def using(use, formula):
    def step(self, x, b, h, w):
        return use(self, x, formula(self, x, b, h, w))

    step.names = use.__code__.co_names
    return step


def names_in(function):
    return getattr(function, "names", function.__code__.co_names)


def steps_at(recipe, *places):
    """Keys of their own, for a dictionary of modules has a method `values`."""
    return nn.ModuleDict({f"at_{place}": Steps(recipe.at(place), recipe.dim) for place in places if recipe.at(place)})


class Heads(nn.Module):
    """Attention of `x` [b, n, c] on `keys` [b, m, c], whose tokens lie on maps of h x w and kh x kw."""

    def __init__(self, recipe):
        super().__init__()
        dim, self.heads, self.core, self.split = recipe.dim, recipe.heads, recipe.core, recipe.split
        self.fused = "fused" in self.split and not recipe.block.startswith("reduced")
        if self.fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.on = steps_at(recipe, "queries", "values", "attended", "scale", "mask")

    def parted(self, x):
        b, n, c = x.shape
        if self.split == "view":
            return x.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        if self.split == "unflatten":
            return x.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3)
        return x.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)

    def step(self, place, x, b, h, w):
        return self.on[f"at_{place}"].forward(x, b, h, w) if f"at_{place}" in self.on else x

    def forward(self, x, keys, size, key_size, mask=None):
        b, n, c = x.shape
        h, w = size
        if self.fused:
            view = self.qkv(x).view if "view" in self.split else self.qkv(x).reshape
            q, k, v = view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.parted(self.q(x)), self.parted(self.k(keys)), self.parted(self.v(keys))
        q, v = self.step("queries", q, b, h, w), self.step("values", v, b, *key_size)
        scale = (c // self.heads) ** -0.5
        if "at_scale" in self.on:
            scale = self.on["at_scale"].forward(q.new_ones(1, 1), b, h, w) * scale
        masks = [] if mask is None else [mask]
        if "at_mask" in self.on:
            masks += self.on["at_mask"].masks(self.heads, h, w, *key_size)
        y = self.attend(q, k, v, scale, masks)
        y = self.step("attended", y.transpose(1, 2).reshape(b, n, c), b, h, w)
        return self.proj(y)

    def attend(self, q, k, v, scale, masks):
        if self.core == "sdpa":
            added = None
            for mask in masks:
                if mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
                mask = mask.to(q.dtype)
                added = mask if added is None else added + mask
            if isinstance(scale, torch.Tensor):
                q, scale = q * scale, 1.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        if self.core == "bmm":
            a = torch.bmm(q.flatten(0, 1) * scale, k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
        elif self.core == "einsum":
            a = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        else:
            a = q @ k.transpose(-2, -1) * scale
        for mask in masks:
            a = a.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else a + mask
        a = a.softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", a, v) if self.core == "einsum" else a @ v


class ConvHeads(nn.Module):
    """Attention on a map [b, c, h, w] with projections by 1x1 convolutions."""

    attend = Heads.attend

    def __init__(self, recipe):
        super().__init__()
        dim, self.heads, self.core = recipe.dim, recipe.heads, recipe.core
        self.q, self.kv, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.on = steps_at(recipe, "scale", "mask")

    def forward(self, x, mask=None):
        b, c, h, w = x.shape
        q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w).transpose(2, 3) for t in (q, k, v))
        scale = (c // self.heads) ** -0.5
        if "at_scale" in self.on:
            scale = self.on["at_scale"].forward(q.new_ones(1, 1), b, h, w) * scale
        masks = [] if mask is None else [mask]
        if "at_mask" in self.on:
            masks += self.on["at_mask"].masks(self.heads, h, w, h, w)
        return self.out(self.attend(q, k, v, scale, masks).transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """Norm, attention and an MLP, on tokens or on a map."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe, dim = recipe, recipe.dim
        self.norm = nn.GroupNorm(1, dim) if recipe.block == "conv map" else nn.LayerNorm(dim)
        self.attn = (ConvHeads if recipe.block == "conv map" else Heads)(recipe)
        if recipe.block == "reduced":
            self.reduce, self.key_norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)
        if recipe.mlp:
            kinds = (nn.Conv2d, (1,)) if recipe.block == "conv map" else (nn.Linear, ())
            self.fc1, self.fc2 = kinds[0](dim, 2 * dim, *kinds[1]), kinds[0](2 * dim, dim, *kinds[1])
        self.steps = Steps(recipe.at("tokens"), dim)
        self.resolution = tuple(side // recipe.patch for side in recipe.image)

    def attend(self, *given):
        return (self.attn if self.recipe.shell == "modules" else self.attn.forward)(*given)

    def forward(self, x, size=None, w=None, shape=None, mask=None):
        kind, training = self.recipe.block, self.training
        if training and self.recipe.skipping == "in training":
            return x
        if kind in ("map", "rows", "windows"):
            h, w = x.shape[1:3]
        elif kind == "conv map":
            h, w = x.shape[2:]
        else:
            h, w = self.sides(x, size, w, shape)
            x = self.steps.forward(x, len(x), h, w)
        y = self.mixed(self.norm(x), h, w, mask)
        if training and self.recipe.skipping == "by chance":
            y = y * (torch.rand((len(y),) + (1,) * (y.ndim - 1)) < 0.5)
        elif self.recipe.skipping == "batch of one":
            y = y if len(y) > 1 else 0.5 * y
        x = x + y
        if self.recipe.mlp:
            x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x

    def sides(self, x, size, w, shape):
        n, way = x.shape[1], self.recipe.sizes
        if way == "root":
            return int(n**0.5), int(n**0.5)
        if way == "isqrt":
            return math.isqrt(n), n // math.isqrt(n)
        if way == "attributes":
            return self.h, self.w
        if way == "resolution":
            return self.resolution
        return (size, w) if way == "arguments" else size if way == "tuple" else (shape["h"], shape["w"])

    def mixed(self, x, h, w, mask):
        kind, recipe = self.recipe.block, self.recipe
        if kind == "conv map":
            return self.attend(x, mask)
        if kind == "map":
            y = x.reshape(len(x), h * w, x.shape[-1])
            return self.attend(y, y, (h, w), (h, w), mask).reshape(x.shape)
        if kind == "rows":
            y = x.reshape(-1, w, x.shape[-1])
            return self.attend(y, y, (1, w), (1, w)).view(*x.shape)
        if kind == "tokens":
            return self.attend(x, x, (h, w), (h, w), mask)
        if "windows" in kind:
            return self.windows(x.view(len(x), h, w, -1), h, w).reshape(x.shape)
        b, c = len(x), x.shape[2]
        y = x.transpose(1, 2).reshape(b, c, h, w)
        if kind == "reduced":
            y = self.reduce(y)
        else:
            y = F.adaptive_avg_pool2d(y, (max(h // 2, 1), max(w // 2, 1)) if recipe.clamped else 2)
        keys = y.reshape(b, c, -1).transpose(1, 2)
        if kind == "reduced":
            keys = self.key_norm(keys)
        return self.attend(x, keys, (h, w), tuple(y.shape[2:]), mask)

    def windows(self, x, height, width):
        recipe, b, c, s = self.recipe, len(x), x.shape[-1], self.recipe.window
        if recipe.clamped:
            s = min(s, height, width)
        if recipe.padded:
            x = F.pad(x, (0, 0, 0, -width % s, 0, (s - height % s) % s))
        h, w = x.shape[1:3]
        shift = {"half window": s // 2, "if larger": s // 2 if min(h, w) > s else 0, "quarter map": h // 4}
        shift = shift.get(recipe.shift, 0)
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        t = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        if recipe.batch == "loop":
            count = (h // s) * (w // s)
            t = t.view(b, count, s * s, c)
            t = torch.stack([self.attend(t[:, i], t[:, i], (s, s), (s, s)) for i in range(count)], 1).flatten(0, 1)
        else:
            t = self.attend(t, t, (s, s), (s, s))
        if recipe.batch == "divided":
            b = int(t.shape[0] / (h * w / s / s))
        elif recipe.batch == "-1":
            b = -1
        t = t.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(len(x), h, w, c)
        if shift:
            t = torch.roll(t, (shift, shift), (1, 2))
        return t[:, :height, :width]


class Stem(nn.Module):
    """Patches of an image, as a map."""

    def __init__(self, recipe):
        super().__init__()
        self.kind, self.patch, p, dim = recipe.stem, recipe.patch, recipe.patch, recipe.dim
        if "patches" in self.kind:
            self.embed = nn.Linear(3 * p * p, dim)
        elif self.kind == "two convs":
            self.embed = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1), nn.GELU(), nn.Conv2d(dim, dim, p // 2, p // 2))
        else:
            self.embed = nn.Conv2d(3, dim, p, p)
        self.steps = Steps(recipe.at("image"), 3)

    def forward(self, x):
        p, (b, c, h, w) = self.patch, x.shape
        x = self.steps.forward(x, b, h, w)
        if self.kind == "conv padded":
            x = F.pad(x, (0, (p - w % p) % p, 0, (p - h % p) % p))
        if self.kind == "patches by reshape":
            x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h // p, w // p, -1)
            return self.embed(x).permute(0, 3, 1, 2)
        if self.kind == "patches by unfold":
            x = self.embed(F.unfold(x, p, stride=p).transpose(1, 2))
            return x.transpose(1, 2).view(b, -1, h // p, w // p)
        return self.embed(x)


class Net(nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe, dim = recipe, recipe.dim
        self.stem = Stem(recipe)
        self.before, self.between = Steps(recipe.at("map"), dim), Steps(recipe.at("between"), dim)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.blocks))
        self.masks = Steps(recipe.at("given mask"), dim)
        self.classifies = "class" in recipe.pool
        if self.classifies:
            self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(4 * dim if recipe.pool == "pooled map" else dim, 5)
        if recipe.pool == "with auxiliary in training":
            self.aux = nn.Linear(dim, 3)
        self.last = Steps(recipe.at("logits"), 5)

    def forward(self, x):
        x = self.before.on_map(self.stem(x))
        for i, block in enumerate(self.blocks):
            if i and self.between.functions:
                x = self.between.on_map(x)
            x, first = self.through(block, x)
        h, w = x.shape[2:]
        y = self.pooled(x.flatten(2).transpose(1, 2), first, h, w)
        return self.last.forward(y, len(x), h, w) if self.last.functions else y

    def given_mask(self, h, w):
        mask = None
        if self.masks.functions:
            kh, kw = (h // 2, w // 2) if self.recipe.block == "reduced" else (h, w)
            mask = self.masks.masks(self.recipe.heads, h, w, kh, kw)[0]
        return mask

    def through(self, block, x):
        """The map [b, c, h, w] behind a block, and the class token."""
        kind, way, call = self.recipe.block, self.recipe.sizes, block.forward if self.recipe.shell == "net" else block
        b, c, h, w = x.shape
        mask = self.given_mask(h, w)
        if kind == "conv map":
            return call(x, mask=mask), None
        if kind in ("map", "rows", "windows"):
            return call(x.permute(0, 2, 3, 1), mask=mask).permute(0, 3, 1, 2), None
        x = x.flatten(2).transpose(1, 2)
        if self.classifies:
            x = torch.cat([self.cls.expand(b, -1, -1), x], 1)
        if way == "attributes":
            block.h, block.w = h, w
        if way == "arguments":
            x = call(x, h, w, mask=mask)
        elif way == "tuple":
            x = call(x, (h, w), mask=mask)
        elif way == "dict":
            x = call(x, shape={"h": h, "w": w}, mask=mask)
        else:
            x = call(x, mask=mask)
        first, x = (x[:, 0], x[:, 1:]) if self.classifies else (None, x)
        if x.shape[1] != h * w:
            return x.transpose(1, 2).unsqueeze(-1), first
        return x.transpose(1, 2).reshape(b, c, h, w), first

    def pooled(self, x, first, h, w):
        pool, n = self.recipe.pool, x.shape[1]
        x = self.norm(x)
        if pool == "class token":
            x = x.mean(1) * 0.5 + first
        elif pool == "sum over n":
            x = x.sum(1) / (h * w)
        elif pool == "sum by factor":
            x = x.sum(1) * (1 / n)
        elif pool == "max":
            x = x.amax(1)
        elif pool == "first":
            x = x[:, 0]
        elif pool == "middle":
            x = x[:, n // 2]
        elif pool == "weighted":
            x = (x * torch.linspace(0.1, 1, n)[:, None]).sum(1) / n
        elif pool == "upper rows":
            x = x[:, : (h // 2 + 1) * w].mean(1)
        elif pool == "pooled map":
            x = F.adaptive_avg_pool2d(x.transpose(1, 2).reshape(len(x), -1, h, w), 2).flatten(1)
        elif pool == "with auxiliary in training" and self.training:
            return self.head(x.mean(1)), self.aux(x[:, n // 3])
        else:
            x = x.mean(1)
        return self.head(x)


def build(recipe):
    """The model in float64 and eval mode, with weights so large that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = Net(recipe).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.endswith("weight"):
                nn.init.normal_(parameter, std=1.4 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model


def other_sizes(recipe):
    """Sizes to judge at beside the captured one: as many patches on another map, larger, longer, and uneven."""
    (h, w), p = recipe.image, recipe.patch
    return [(h // 2, w * 2), (h + 2 * p, w + 2 * p), (h, w + p), (h * 2, w), (h + p // 2, w + p + 1)]


PLACES_OF = {
    "tokens": ("tokens", "queries", "values", "attended", "mask", "given mask"),
    "map": ("queries", "values", "attended", "mask", "given mask"),
    "conv map": ("mask", "given mask"),
    "windows": ("queries", "values", "attended", "mask"),
    "windows on tokens": ("tokens", "queries", "values", "attended", "mask"),
    "rows": ("queries", "values", "attended", "mask"),
    "reduced": ("tokens", "queries", "values", "attended", "mask", "given mask"),
    "reduced by pooling": ("tokens", "queries", "values", "attended", "mask"),
}
"""Where steps can stand by the kind of block, beside the places that all have."""


def step_by(choose, block, pool, blocks):
    """A step that this kind of model can take; ``choose`` takes one of a list."""
    places = ("map", "map", "scale", "logits", "image", *PLACES_OF[block]) + (("between",) if blocks > 1 else ())
    if "class" in pool:
        places = [place for place in places if "mask" not in place]
    place = choose(places)
    named = STRUCTURAL.get("map" if place == "between" else place, {})
    if place == "tokens" and (block != "tokens" or blocks > 1):
        named = TOKEN_STEPS
    if place in ("mask", "given mask") or (named and choose((True, True, True, False))):
        return Step(place, choose(list(named)))
    if choose((True, False)):
        return Step(place, choose(list(USES)), choose(NUMBERS))
    return Step(place, choose(list(BRANCHES)), choose(CONDITIONS))


def recipe_by(choose, block=None):
    """A recipe of choices, few enough that one refused choice does not hide all others."""
    block = block or choose(BLOCKS)
    changes = {"block": block, "image": choose(((16, 16), (32, 32), (16, 32), (24, 24), (32, 16), (24, 16)))}
    changes["blocks"] = choose((1, 1, 2))
    if choose((True, False)):
        changes |= {"core": choose(CORES), "split": choose(SPLITS), "mlp": choose((False, True))}
    if choose((True, False)):
        changes["shell"] = choose(SHELLS)
    if block in ("tokens", "windows on tokens", "reduced", "reduced by pooling"):
        changes["sizes"] = choose(("arguments", *SIZES))
    if "windows" in block:
        changes["window"] = choose((4, 4, 2, 3, 8))
        changes |= {"clamped": choose((False, True)), "padded": choose((True, False))}
        changes |= {"shift": choose(("", "", "half window", "if larger", "quarter map"))}
        changes |= {"batch": choose(("b", "divided", "-1", "loop"))}
    if block == "reduced by pooling":
        changes["clamped"] = choose((False, True))
    if choose((True, True, False)):
        changes["pool"] = "mean"
    else:
        pools = POOLS if block == "tokens" else [pool for pool in POOLS if "class" not in pool]
        changes["pool"] = choose(pools)
    if not choose((True, True, True, False)):
        changes["stem"] = choose(STEMS)
    if not choose((True, True, True, True, False)):
        changes["skipping"] = choose(("in training", "by chance", "batch of one"))
    count = choose((1, 1, 2, 0, 3))
    changes["steps"] = tuple(step_by(choose, block, changes["pool"], changes["blocks"]) for _ in range(count))
    changes["seed"] = choose(range(4))
    return Recipe(**changes)
