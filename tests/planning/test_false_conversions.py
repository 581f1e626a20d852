"""A target that is wrong or fails is caught, and leaves the model as it was."""

from __future__ import annotations

import pytest
from attnrewrite.patterns.targets.neighborhood import Neighborhood
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.ir.contract import BetweenProjections, Exactness, Target
from attnrewrite.ir.core import AttentionCore


class Wrong(AttentionCore):
    def forward(self, query, key, value, bias=None):
        return 2 * value


class Raising(AttentionCore):
    def forward(self, query, key, value, bias=None):
        raise ValueError("no kernel for this")


class Lying(Target):
    """Says that it keeps the function, and does not."""

    name = "lying"

    def __init__(self, core):
        self.core = core

    def convert(self, site, index, weights):
        return BetweenProjections(Exactness.EXACT, "it says", self.core())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_conversion_that_is_not_what_it_says_is_caught(model, batch, inplace):
    before = values_of(model)
    with pytest.raises(ConversionError, match=r"(?s)nothing to convert .*differs from the original"):
        attnrewrite.convert(model, Lying(Wrong), batch, inplace=inplace)
    assert_untouched(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_core_that_fails_leaves_the_model_untouched(model, batch, inplace):
    before = values_of(model)
    with pytest.raises(Exception, match="no kernel for this"):
        attnrewrite.convert(model, Lying(Raising), batch, inplace=inplace)
    assert_untouched(model, before)


def test_a_lie_beside_a_lossy_conversion_is_caught(model, batch):
    """End to end nothing can be expected of a lossy conversion: the exact ones must be checked one by one."""
    targets = {"blocks.0.attn": Neighborhood(3), "blocks.1.attn": Lying(Wrong)}
    with pytest.raises(ConversionError, match=r"(?s)strict: 1 sites .*blocks\.1\.attn: .* differs from the original"):
        attnrewrite.convert(model, targets, batch, strict=True)
    converted = attnrewrite.convert(model, targets, batch)
    assert [site.name for site in attnrewrite.report(converted).converted] == ["blocks.0.attn"]
