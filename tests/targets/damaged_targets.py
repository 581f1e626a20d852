"""Targets whose conversions are damaged after they were made, and which no model may be given."""

from __future__ import annotations

import pytest
from target_donors import donor, images

import attnrewrite
from attnrewrite.errors import ConversionError


def damaged(target, damage):
    """``target``, but ``damage`` is called with every conversion before it is returned."""

    class Damaged(type(target)):
        def convert(self, site, index, weights):
            conversion = super().convert(site, index, weights)
            damage(conversion)
            return conversion

    return Damaged(**vars(target))


def assert_not_installed(target, damage):
    with pytest.raises(ConversionError, match="differs from the original"):
        attnrewrite.convert(donor("vit"), damaged(target, damage), images("vit"))
