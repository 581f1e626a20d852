"""Interleaved groups, read from which tokens see which, against the way they are cut: pad, view, permute."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.patterns.recognize.interleaved import recognize_interleaved
from attnrewrite.patterns.recognize.windows import recognize_window
from group_donors import DONORS, GroupAttention, donor, images
from hypothesis import given, settings
from hypothesis import strategies as st
from repetition import thinned

import attnrewrite
from attnrewrite.ir.sites import AttentionSite, Grid, Interleaved

COUNTS = st.integers(1, 4)


@given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.data())
@settings(max_examples=100, deadline=None)
def test_groups_cut_by_views_are_recognized(
    rows: int, columns: int, down: int, across: int, high: int, wide: int, data: st.DataObject
) -> None:
    """Of any number of regions; the last may be short of tokens, by less than leaves a group with one row."""
    short = [data.draw(st.integers(0, i - 1)) if g > 2 else 0 for g, i in ((rows, down), (columns, across))]
    sides = (rows * down * high - short[0], columns * across * wide - short[1])
    groups = GroupAttention(sides, (rows, columns), (down, across)).members
    absent = (groups < 0)[:, None, :].expand(-1, groups.shape[1], -1)
    grid = Grid(*sides)
    found = recognize_window(groups, groups, absent, grid) or recognize_interleaved(groups, groups, absent, grid)
    assert found is not None
    seen = {frozenset(group) - {-1} for group in groups.tolist()} - {frozenset()}
    assert {frozenset(group) - {-1} for group in found.slots(grid).tolist()} - {frozenset()} == seen


def test_a_slot_of_padding_that_counts_as_a_key_is_no_interleaved_group() -> None:
    groups = GroupAttention((7, 6), (4, 3), (2, 2)).members
    assert (groups < 0).any()
    assert recognize_interleaved(groups, groups, None, Grid(7, 6)) is None


@pytest.mark.parametrize("turned", [lambda groups: groups.flip(1), lambda groups: torch.roll(groups, 1, 0)[:, [1, 0]]])
def test_other_orders_and_other_groups_are_none(turned) -> None:
    groups = turned(GroupAttention((4, 4), (2, 1), (2, 1)).members)
    assert recognize_interleaved(groups, groups, None, Grid(4, 4)) is None


def test_queries_that_see_another_group_are_none() -> None:
    groups = GroupAttention((4, 6), (2, 2), (2, 3)).members
    assert recognize_interleaved(groups, groups.roll(1, 0), None, Grid(4, 6)) is None


EXPECTED = {
    "timm": ["interleaved(2, interval 4x6)", "interleaved(2, interval 2x3)"],
    "torchvision": ["interleaved(4, interval 4)", "interleaved(4, interval 2)"],
    "views": ["interleaved(4x3, interval 2x4)"],
    "indexed": ["interleaved(2x4, interval 4x3)"],
    "no bias": ["interleaved(4x6, interval 2x1)"],
    "regions": ["interleaved(2x3, interval 2)"],
    "padded": ["interleaved(2, interval 2x3)"],
}


@pytest.mark.parametrize("name", thinned(DONORS, 2))
def test_models_are_lifted(name: str) -> None:
    plan = attnrewrite.plan(donor(name), "identity", images(name))
    assert not [refused for refused in plan.refused if refused.kind == "attention"]
    sites = [planned.site for planned in plan.sites if isinstance(planned.site, AttentionSite)]
    found = [site for site in sites if isinstance(site.keys, Interleaved)]
    expected = EXPECTED[name]
    assert [str(site.keys) for site in found] == expected
    assert all(f"keys {keys}" in str(plan) for keys in expected)
    assert all((site.bias is None) == (name == "no bias") for site in sites)
    assert all(site.bias is None or site.bias.kind == "table" for site in sites)
