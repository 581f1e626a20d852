"""Numbers that a forward makes of its batch without a trace, for ``len`` gives a plain integer: right or refused.

Looks see a few samples more than the captured ones: what is alike on all of them, such as the digits of ``len(x)`` or
its root, is taken for a constant.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import attnrewrite
from attnrewrite.errors import AttnRewriteError

NUMBERS = {
    "itself": len,
    "bits": lambda x: len(x).bit_length(),
    "power": lambda x: 2 ** len(x),
    "pairs": lambda x: math.comb(len(x) + 1, 2),
    "odd or even": lambda x: 1 + len(x) % 2,
    "halves": lambda x: len(x) // 2,
    "of three": lambda x: 1 + len(x) % 3,
    "logarithm": lambda x: 0.1 * math.log2(8 * len(x)),
    "line": lambda x: 0.1 * len(x) + 0.2,
}


class Net(nn.Module):
    """One attention, times a number of the batch; of any size, or of one."""

    def __init__(self, number, side=None):
        super().__init__()
        self.number, self.side = number, side
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, image):
        if self.side not in (None, image.shape[-1]):
            raise ValueError("another size")
        x = self.stem(image).flatten(2).transpose(1, 2)
        batch, count, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, count, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        return self.number(x) * self.proj(mixed)


def difference(actual, expected):
    return float((actual - expected).detach().abs().max())


@pytest.mark.parametrize("side", [None, 32], ids=["any size", "one size"])
@pytest.mark.parametrize("captured", [1, 2])
@pytest.mark.parametrize("number", NUMBERS)
def test_another_batch_is_right_or_refused(number, captured, side):
    torch.manual_seed(0)
    donor = Net(NUMBERS[number], side).double().eval()
    image = torch.randn(33, 3, 32, 32, dtype=torch.float64)
    try:
        converted = attnrewrite.convert(donor, "identity", image[:captured], progress=False)
    except AttnRewriteError:
        assert number != "itself"  # that is an extent of what the module is given
        return
    assert difference(converted(image[:captured]), donor(image[:captured])) < 1e-9
    for batch in (1, 2, 3, 4, 5, 8, 16, 33):
        try:
            actual = converted(image[:batch])
        except AttnRewriteError:
            continue
        assert difference(actual, donor(image[:batch])) < 1e-9, batch
