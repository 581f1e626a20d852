"""The cores against attention written out with a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_oracle import dilated_mask
from torch import Tensor
from window_cases import padded_windows

from attnrewrite import AttnRewriteError
from attnrewrite.cores import NeighborhoodAttention, ReducedNeighborhoodAttention, WindowAttention
from attnrewrite.cores.neighborhood import clamped_kernel
from attnrewrite.ir.sites import Grid, Window
from attnrewrite.operators.index_rule import relative_offset

HEADS, DIM = 2, 4


def masked(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale + added
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def operands(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, queries, HEADS, DIM), (2, keys, HEADS, DIM), (2, keys, HEADS, DIM))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


@given(st.integers(2, 9), st.integers(2, 9), padded_windows(longest_side=4))
@settings(max_examples=60, deadline=None)
def test_windows_equal_attention_within_their_slots(height: int, width: int, window: Window) -> None:
    grid, (rows, columns) = Grid(height, width), window.size
    query, key, value = operands(grid.tokens, grid.tokens)
    bias = torch.randn(HEADS, rows * columns, rows * columns, dtype=torch.float64)
    pads = [torch.randn(HEADS, DIM, dtype=torch.float64) for _ in range(2)]
    core = WindowAttention(window, grid, 0.7).eval()
    maps = [part.unflatten(1, (height, width)) for part in (query, key, value)]
    expected = torch.empty_like(query)
    for block in window.slots(grid).tolist():
        slots = [slot for slot, token in enumerate(block) if token != Window.ABSENT]
        real = [slot for slot in slots if block[slot] >= 0]
        if not real:
            continue
        keys, values = (
            torch.stack([part[:, block[s]] if block[s] >= 0 else pad.expand(2, -1, -1) for s in slots], 1)
            for part, pad in zip((key, value), pads, strict=True)
        )
        tokens = [block[slot] for slot in real]
        expected[:, tokens] = masked(query[:, tokens], keys, values, bias[:, real][:, :, slots], 0.7)
    dropping = WindowAttention(window, grid, 0.7, dropout=1e-15).train()
    for mixed in (core(*maps, bias, *pads), dropping(*maps, bias, *pads)):
        torch.testing.assert_close(mixed.flatten(1, 2), expected, rtol=0, atol=1e-12)


def test_a_window_that_was_never_seen_to_pad_does_not_guess() -> None:
    core = WindowAttention(Window((3, 3)), Grid(6, 6), 1.0)
    core(*[torch.randn(1, 9, 3, HEADS, DIM) for _ in range(3)])
    with pytest.raises(AttnRewriteError, match="7x6"):
        core(*[torch.randn(1, 7, 6, HEADS, DIM) for _ in range(3)])


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), (1, 1)), ((2, 3), (1, 2)), ((7, 9), (1, 1)), ((7, 3), (1, 1))]
)
@pytest.mark.parametrize("training", [False, True])
def test_neighborhoods_equal_masked_attention(
    prefix: int, kernel: tuple[int, int], dilation: tuple[int, int], training: bool
) -> None:
    grid = Grid(7, 9, prefix)
    query, key, value = operands(grid.tokens, grid.tokens)
    core = NeighborhoodAttention(kernel, dilation, grid, 0.5, dropout=1e-12).train(training)
    added = torch.zeros(grid.tokens, grid.tokens, dtype=torch.float64)
    added = added.masked_fill(~dilated_mask(kernel, dilation, grid), -math.inf)
    torch.testing.assert_close(core(query, key, value), masked(query, key, value, added, 0.5), rtol=0, atol=1e-9)


def test_a_relative_bias_follows_the_kernel() -> None:
    grid, kernel = Grid(6, 5), (3, 3)
    query, key, value = operands(grid.tokens, grid.tokens)
    offset = relative_offset((6, 5))
    bias = torch.randn(HEADS, 11 * 9, dtype=torch.float64)[:, offset]
    entries = torch.zeros(11 * 9, dtype=torch.long)
    entries[offset.flatten()] = torch.arange(offset.numel())
    core = NeighborhoodAttention(kernel, (1, 1), grid, 0.5, entries=entries).eval()
    added = bias.masked_fill(~dilated_mask(kernel, (1, 1), grid), -math.inf)
    expected = masked(query, key, value, added, 0.5)
    torch.testing.assert_close(core(query, key, value, bias[None]), expected, rtol=0, atol=1e-12)


def test_the_neighborhood_rule_on_a_small_case() -> None:
    """Five tokens, kernel 3: windows slide inward at the border."""
    seen = dilated_mask((1, 3), (1, 1), Grid(1, 5)).int().tolist()
    assert seen == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_kernels_are_clamped_to_what_the_map_holds() -> None:
    assert clamped_kernel((7, 7), (1, 2), Grid(5, 8)) == (5, 4)


def test_a_reduced_map_is_seen_from_the_cell_above() -> None:
    grid, reduced = Grid(8, 4), Grid(4, 2)
    query, key, value = operands(32, 8)
    core = ReducedNeighborhoodAttention((1, 1), grid, reduced, 1.0).eval()
    mixed = core(query, key, value)
    for token in range(32):
        row, column = token // 4 // 2, token % 4 // 2
        torch.testing.assert_close(mixed[:, token], value[:, row * 2 + column])


def test_a_bias_to_a_reduced_map_counts_inside_the_kernel() -> None:
    grid, reduced = Grid(4, 4), Grid(2, 2)
    query, key, value = (torch.randn(1, tokens, 1, 8, dtype=torch.float64) for tokens in (16, 4, 4))
    bias = torch.randn(1, 1, 16, 4, dtype=torch.float64)
    core = ReducedNeighborhoodAttention((1, 2), grid, reduced, 0.5).eval()
    above = torch.arange(16) // 4 // 2 * 2  # the row of cells that a query sees
    seen = torch.arange(4) // 2 * 2 == above[:, None]
    scores = 0.5 * query[0, :, 0] @ key[0, :, 0].T + bias[0, 0]
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[0, :, 0]
    assert torch.allclose(core(query, key, value, bias)[0, :, 0], expected, atol=1e-12)


def test_other_sizes_keep_the_aspect_ratio_or_raise() -> None:
    core = NeighborhoodAttention((3, 3), (1, 1), Grid(4, 6, 1), 1.0).eval()
    assert core(*operands(8 * 12 + 1, 8 * 12 + 1)).shape == (2, 97, HEADS, DIM)
    with pytest.raises(AttnRewriteError, match="aspect ratio"):
        core(*operands(26, 26))
