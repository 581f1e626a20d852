"""Why an attention could not be read: the operator, the tensors, the cause."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionError


class Net(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.stem, self.qkv, self.other = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 48)
        self.proj, self.head, self.mix = nn.Linear(16, 16), nn.Linear(16, 5), mix

    def forward(self, x):
        return self.head(self.mix(self, self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


def heads(qkv):
    return qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q, k, v):
    return ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)


def windows(x):
    b, h, w, c = x.shape
    return x.view(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)


def unwindowed(t, b, h, w):
    return t.view(b, h // 4, w // 4, 4, 4, -1).transpose(2, 3).reshape(b, h, w, -1)


def squashed(self, x):
    q, k, v = heads(self.qkv(windows(x)))
    return unwindowed(self.proj(attend(q.tanh(), k, v)), *x.shape[:3])


def joint(self, x):
    one, other = heads(self.qkv(x.flatten(1, 2))), heads(self.other(x.flatten(1, 2)[:, ::2]))
    q, k, v = (torch.cat(parts, 2) for parts in zip(one, other, strict=True))
    return self.proj(attend(q, k, v)[:, : x.shape[1] * x.shape[2]]).view(x.shape)


def channels(self, x):
    q, k, v = (part.mT for part in heads(self.qkv(x.flatten(1, 2))))
    mixed = (q @ k.mT).softmax(-1) @ v
    return self.proj(mixed.mT.transpose(1, 2).flatten(2)).view(x.shape)


def squashed_channels(self, x):
    q, k, v = (part.mT for part in heads(self.qkv(x.flatten(1, 2))))
    mixed = (q.tanh() @ k.tanh().mT).softmax(-1) @ v
    return self.proj(mixed.mT.transpose(1, 2).flatten(2)).view(x.shape)


REASONS = {
    squashed: r"changed by aten::tanh between projection and product \(16 queries of 8 against the 64 tokens that qkv",
    joint: r"joint attention: aten::cat joins \[1, 2, 64, 8\] and \[1, 2, 32, 8\] after their projections",
    channels: r"attention over channels: the product of its queries \[1, 2, 8, 64\] with the keys sums over the tokens",
    squashed_channels: r"attention over channels: the product of its queries",
}


@pytest.mark.parametrize("mix", REASONS, ids=lambda mix: mix.__name__)
def test_the_reason_names_the_operator_the_tensors_and_the_cause(mix):
    torch.manual_seed(0)
    with pytest.raises(ConversionError, match=REASONS[mix]) as raised:
        attnrewrite.convert(Net(mix).eval(), "neighborhood", torch.randn(1, 3, 32, 32), progress=False)
    assert "tensor(" not in str(raised.value)
