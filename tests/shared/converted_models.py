"""The models that the tests of conversion share, each converted once."""

from __future__ import annotations

import copy

import pytest
from pairs import CONVERSIONS, Pair
from small_models import BUILDERS, images, small_model

import attnrewrite


@pytest.fixture(scope="session")
def pairs():
    made = {}

    def pair(name, to="identity"):
        if (name, to) not in made:
            try:
                made[name, to] = Pair(name, to)
            except Exception as cause:
                made[name, to] = cause
        if isinstance(made[name, to], Exception):
            raise made[name, to]
        return made[name, to]

    return pair


@pytest.fixture(params=CONVERSIONS, ids="-".join)
def pair(request, pairs):
    return pairs(*request.param)


@pytest.fixture(params=BUILDERS)
def identity(request, pairs):
    return pairs(request.param, "identity")


@pytest.fixture(scope="session")
def vit():
    """Two blocks, never changed by a test."""
    return small_model("timm_vit")


@pytest.fixture(scope="session")
def batch():
    return images("timm_vit")


@pytest.fixture
def model(vit):
    return copy.deepcopy(vit)


@pytest.fixture(scope="session")
def exact(vit, batch):
    return attnrewrite.convert(vit, "identity", batch)


@pytest.fixture(scope="session")
def projected(vit, batch):
    return attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3)
