"""Steps of generated models that use their sizes themselves: on maps, on tokens, and on the image."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

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


def centered_by_hand(self, x, b, h, w):
    return x - x.sum((2, 3), keepdim=True) / (h * w)


def centered_by_factor(self, x, b, h, w):
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
    padded_if_needed, cut_to_even, upper_half, lower_right, square_from_the_middle, rolled, centered_by_hand,
    centered_by_factor, rows_by_hand, rows_split, rows_joined_pairwise, columns_running, shrunk_and_back,
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
