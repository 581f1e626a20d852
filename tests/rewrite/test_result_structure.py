"""The structure in which a rewritten module packs its result."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from model_queries import rewritten_names
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers.modeling_outputs import BaseModelOutput

import attnrewrite


class Returning(nn.Module):
    """One attention, whose result is packed in some way."""

    def __init__(self, pack):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.query, self.key, self.value, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.pack = pack

    def forward(self, image):
        x = self.stem(image).flatten(2).transpose(1, 2)
        query, key, value = (
            part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.pack(self.proj(mixed), x)


class Named(NamedTuple):
    last_hidden_state: torch.Tensor
    hidden_states: tuple


def named(result, x):
    return Named(result, (x,))


def output_object(result, x):
    return BaseModelOutput(last_hidden_state=result, hidden_states=(x,))


def dictionary(result, x):
    return {"last_hidden_state": result, "hidden_states": [x, None, 3]}


@pytest.mark.parametrize("pack", [named, output_object, dictionary])
def test_the_result_keeps_its_structure(pack):
    donor, batch = Returning(pack), torch.randn(2, 3, 32, 32)
    converted = attnrewrite.convert(donor, "identity", batch[:1])
    assert rewritten_names(converted) == [""]
    with torch.no_grad():
        expected, actual = donor(batch), converted(batch)
    assert type(actual) is type(expected)
    ours, theirs = tree_flatten(actual), tree_flatten(expected)
    assert ours[1] == theirs[1]
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert torch.allclose(one, other, atol=1e-5) if isinstance(other, torch.Tensor) else one == other
