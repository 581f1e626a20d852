"""Costs of interleaved groups: counted to the integer, as they are and after conversion."""

from __future__ import annotations

from functools import cache

import pytest
from group_donors import DONORS, donor, images

import attnrewrite
from attnrewrite.costs import Report

CASES = [
    (name, target)
    for name in ("regions", "padded")
    for target in ("identity", "neighborhood", "long_short_distance")
]
LONG = pytest.param("timm", "neighborhood", marks=pytest.mark.slow)


@cache
def report(name: str) -> Report:
    return attnrewrite.analyze(donor(name), images(name, 1))


@pytest.mark.parametrize("name", DONORS)
def test_donors_are_counted(name: str) -> None:
    found = report(name)
    assert found.checks
    assert all(check.equal for check in found.checks)
    assert found.at(*DONORS[name][1]).macs == found.total
    assert [site for site in found.sites if site.kind == "LDA"]


@pytest.mark.parametrize(("name", "target"), [*CASES, LONG])
def test_a_conversion_costs_what_was_predicted(name: str, target: str) -> None:
    batch = images(name, 1)
    predicted = attnrewrite.analyze(donor(name), batch, to=target).comparison
    after = attnrewrite.analyze(attnrewrite.convert(donor(name), target, batch, progress=False), batch)
    assert predicted is not None
    assert predicted.after_macs == after.total
    assert all(check.equal for check in after.checks)
