"""Whether a call left a model as it was."""

from __future__ import annotations

import torch
from torch import nn


def values_of(module):
    """Everything a call could leave behind, in a form that can be compared."""
    plain = {}
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                plain[name, key] = {inner: id(held) for inner, held in value.items()}
            elif key.endswith("_hooks") or "hooks_" in key:
                plain[name, key] = len(value) if hasattr(value, "__len__") else value
            else:
                plain[name, key] = repr(value)
        plain[name, "class"] = type(child)
    tensors = {name: value.clone() for name, value in (*module.state_dict().items(), *module.named_buffers())}
    gradients = {name: (id(p.grad), p.requires_grad, p._version) for name, p in module.named_parameters()}
    return plain, tensors, gradients


def assert_untouched(module, before):
    plain, tensors, gradients = values_of(module)
    assert plain == before[0]
    assert gradients == before[2]
    assert list(tensors) == list(before[1])
    for name, value in before[1].items():
        assert torch.equal(tensors[name], value), name


class Counting(nn.Module):
    """Attention that writes to itself: a buffer, an attribute and a list, in every forward; with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.batch_norm = nn.BatchNorm2d(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.size = [], None

    def forward(self, x):
        self.calls += 1
        x = self.batch_norm(self.stem(x))
        self.size = tuple(x.shape[-2:])
        self.seen.append(self.size)
        x = x.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = ((query @ key.transpose(-2, -1)) / 8**0.5).softmax(-1) @ value
        return self.proj(x.transpose(1, 2).flatten(2)).mean(1)
