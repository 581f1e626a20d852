"""Every conversion that other people's code is run around."""

from __future__ import annotations

import pytest
from small_conversions import CONVERSIONS, converted_model


@pytest.fixture(params=CONVERSIONS, ids=lambda given: f"{given[0].__name__}-{given[1]}")
def conversion(request):
    return request.param


@pytest.fixture
def model(conversion):
    return converted_model(*conversion)
