"""Projections hand queries, keys and values on in their own layouts, and every backend attends to the same numbers."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from map_models import HEADS, WIDTH, map_images, map_model
from small_models import assert_same_gradients, difference, gradients
from torch import nn

import attnrewrite
from attnrewrite.operators import dispatch as lowering
from attnrewrite.operators.dispatch import select_backend, use_backend


class PackedBehindChannels(nn.Module):
    """Tokens whose projection is packed as ``(heads, dim, 3)``."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        tokens = x.flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(2, (HEADS, -1, 3)).permute(4, 0, 2, 1, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed).mT.reshape(x.shape)


MODELS = {
    "channels first": map_model,
    "channels first, packed behind them": lambda: map_model(packing="hd3"),
    "packed behind the channels": lambda: map_model(PackedBehindChannels()),
}


@pytest.fixture
def chosen(monkeypatch):
    """The names of the backends that run."""
    names = set()

    def select(request, name):
        backend = select_backend(request, name)
        names.add(backend.name)
        return backend

    monkeypatch.setattr(lowering, "select_backend", select)
    return names


@pytest.mark.parametrize("side", [14, 19, 28])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_default_backend_gives_what_the_reference_gives(build, side, chosen):
    batch = map_images(batch=1, size=(4 * side, 4 * side))  # tiles of one image are views
    converted = attnrewrite.convert(build(), "neighborhood", batch, kernel_size=13)
    chosen.clear()
    actual, actual_gradients = converted(batch), gradients(converted, batch)
    assert chosen == {"tiled"}
    with use_backend("reference"):
        expected, expected_gradients = converted(batch), gradients(converted, batch)
    assert difference(actual, expected) < 1e-11
    assert_same_gradients(actual_gradients, expected_gradients)
