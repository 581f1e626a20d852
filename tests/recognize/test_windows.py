"""Windows, read from which tokens see which, against the way the libraries cut them: pad, roll, partition, mask."""

from __future__ import annotations

import torch
from attnrewrite.patterns.recognize.windows import recognize_window
from attnrewrite.patterns.relative_table import relative_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from window_cases import padded_windows

from attnrewrite.ir.sites import Grid, Window
from attnrewrite.operators.index_rule import relative_offset

SIDES = st.integers(1, 13)
SIZES = st.integers(1, 5)


def partition(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = tokens.shape
    blocks = tokens.view(height // size[0], size[0], width // size[1], size[1]).transpose(1, 2)
    return blocks.reshape(-1, size[0] * size[1])


def swin_groups(grid: Grid, window: Window) -> tuple[Tensor, Tensor]:
    """Tokens (-1: padding) of every window and the mask between its slots, as published: roll, pad, cut, mask."""
    size = window.size
    padded = [-(-side // s) * s for side, s in zip((grid.height, grid.width), size, strict=True)]
    shift = tuple(s if p > w else 0 for s, p, w in zip(window.shift, padded, size, strict=True))
    tokens = torch.arange(grid.tokens).view(grid.height, grid.width)
    back = (-shift[0], -shift[1])
    if window.rolled_first:
        tokens = torch.roll(tokens, back, (0, 1))
    full = torch.full(padded, -1)
    full[: grid.height, : grid.width] = tokens
    if not window.rolled_first:
        full = torch.roll(full, back, (0, 1))
    region = torch.zeros(padded, dtype=torch.long)
    for axis, (s, w) in enumerate(zip(shift, size, strict=True)):
        place = torch.arange(padded[axis])
        number = (
            (place >= padded[axis] - w).long() + (place >= padded[axis] - s).long() if s else torch.zeros_like(place)
        )
        region = region * 3 + (number[:, None] if axis == 0 else number)
    labels = partition(region, size)
    return partition(full, size), labels[:, :, None] != labels[:, None, :]


@given(SIDES, SIDES, padded_windows(longest_side=5))
@settings(max_examples=150, deadline=None)
def test_windows_as_published_are_recognized(height: int, width: int, window: Window) -> None:
    grid, (rows, columns) = Grid(height, width), window.size
    groups, mask = swin_groups(grid, window)
    found = recognize_window(groups, groups, mask, grid, (True, window.rolled_first))
    assert found is not None
    assert found.size == window.size or grid.tokens == 1 or rows * columns == found.size[0] * found.size[1]
    assert torch.equal(visible(found, grid), visible(window, grid))


def visible(window: Window, grid: Grid) -> Tensor:
    """``[tokens, tokens + 1]``: how often each token sees each other one, and padding."""
    slots = window.slots(grid)
    seen = torch.zeros(grid.tokens, grid.tokens + 1, dtype=torch.long)
    for block in slots.tolist():
        for query in (token for token in block if token >= 0):
            for key in block:
                if key != Window.ABSENT:
                    seen[query, key if key >= 0 else grid.tokens] += 1
    return seen


def test_a_window_holds_every_token_once() -> None:
    for shift in ((0, 0), (2, 1)):
        slots = Window((3, 4), shift, padding_keys=True).slots(Grid(7, 9))
        assert slots[slots >= 0].sort().values.tolist() == list(range(63))


def test_groups_that_are_no_windows_are_not_recognized() -> None:
    groups = torch.arange(16).view(8, 2).flip(1)
    assert recognize_window(torch.randperm(16).view(4, 4), torch.randperm(16).view(4, 4), None, Grid(4, 4)) is None
    interleaved = torch.arange(16).view(4, 4).T.contiguous()
    assert recognize_window(interleaved, groups.view(4, 4), None, Grid(4, 4)) is None


@given(st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_relative_bias_is_read_as_its_table(rows: int, columns: int) -> None:
    table = torch.randn(2, (2 * rows - 1) * (2 * columns - 1), dtype=torch.float64)
    dense = table[:, relative_offset((rows, columns))]
    found = relative_table(dense, (rows, columns))
    assert found is not None
    assert torch.equal(found[0].flatten(1), table)


def test_a_bias_that_is_not_relative_is_not_read_as_one() -> None:
    dense = torch.zeros(1, 9, 9, dtype=torch.float64)
    dense[0, 0, 1] = 1.0
    assert relative_table(dense, (3, 3)) is None
