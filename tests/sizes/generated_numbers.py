"""What a generated model computes from its sizes, and what it does with such a number on any tensor."""

from __future__ import annotations

import math

import torch

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
