"""Masks that generated models make of their sizes, for scores ``[.., h * w, h' * w']``."""

from __future__ import annotations

import torch
from generated_steps import coordinates
from torch.nn import functional as F


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
