"""Grouped attention: tiles against the reference, against rolled and masked windows, and identities."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, grouped_problem, grouped_problems, on, random, results
from attnrewrite.backends.tiled import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad, scaled_dot_product_attention

from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import refusals

BACKENDS = ["plain", "reference", "tiled"]


def tiled_problems():
    """Random ones that tiles serve."""
    return grouped_problems().filter(
        lambda problem: refusals(Request.of(problem, needs_gradient=True))["tiled"] is None
    )


@settings(max_examples=30, deadline=None)
@given(tiled_problems(), st.sampled_from([1, 3000, 1 << 22]))
def test_tiles_of_any_run_are_the_reference(problem, run_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.RUN_BYTES, "cpu", run_bytes)
        tiled = results(on("tiled"), problem)
    assert_same(tiled, results(on("reference"), problem))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(backend, padded):
    problem = grouped_problem(
        (4, 3), (2, 2), heads=1, dim=2, bias=True, padded=padded, shift=(1, 0), scale=0.7
    )
    leaves = [operand.requires_grad_() for operand in problem.operands if operand is not None]
    absent = [None] * (8 - len(leaves))
    assert torch.autograd.gradcheck(
        lambda *operands: on(backend)(problem.with_operands([*operands, *absent])), leaves
    )


def rolled_windows(query, key, value, window, shift, bias, pad_key, pad_value):
    """Swin's way: pad, roll, cut into windows, mask the pairs that were no neighbors before the roll."""
    grid = query.shape[1:3]
    rows, columns = (torch.arange(-(-size // window) * window) for size in grid)

    def padded(source, filler):
        target = (
            torch.zeros(len(source), len(rows), len(columns), *source.shape[3:], dtype=source.dtype) + filler
        )
        target[:, : grid[0], : grid[1]] = source
        return target

    def cut(source):
        rolled = source.roll((-shift, -shift), (1, 2)).unflatten(2, (-1, window)).unflatten(1, (-1, window))
        return rolled.transpose(2, 3).flatten(3, 4).flatten(1, 2).transpose(2, 3)  # [B, windows, heads, n, d]

    block = (rows[:, None] - shift) // window * 100 + (columns - shift) // window
    block = cut(block[None, :, :, None, None])[0, :, :, :, 0]
    mask = torch.where(block[..., None] == block[:, :, None], 0.0, -torch.inf)
    operands = padded(query, 0), padded(key, pad_key), padded(value, pad_value)
    output = scaled_dot_product_attention(*map(cut, operands), mask + bias)
    tokens = output.transpose(2, 3).unflatten(2, (window, window)).unflatten(1, (-1, len(columns) // window))
    joined = tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return joined.roll((shift, shift), (1, 2))[:, : grid[0], : grid[1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 2, 3])
@pytest.mark.parametrize("grid", [(8, 12), (9, 7), (3, 4), (10, 8)])
def test_shifted_windows_are_swins(grid, shift, backend):
    problem = grouped_problem(grid, (4, 4), batch=2, value_dim=3, bias=True, padded=True)
    query, key, value, bias, pad_key, pad_value, *_ = problem.operands
    output = grouped_attention(
        query, key, value, 4, shift, bias=bias, pad_key=pad_key, pad_value=pad_value, backend=backend
    )
    assert_same([output], [rolled_windows(query, key, value, 4, shift, bias, pad_key, pad_value)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_keys_of_zero_are_zero_padding(backend):
    query, key, value, *_ = grouped_problem((6, 6), (4, 4), value_dim=3).operands
    zero = torch.zeros(2, 3, dtype=torch.float64)
    with_zeros = grouped_attention(query, key, value, 4, pad_key=zero, pad_value=zero, backend=backend)
    padded = [pad(x, (0, 0, 0, 0, 0, 2, 0, 2)) for x in (query, key, value)]
    assert_same([with_zeros], [grouped_attention(*padded, 4, backend=backend)[:, :6, :6]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_matter_on_a_divisible_map(backend):
    query, key, value, _, pad_key, pad_value, *_ = grouped_problem((6, 4), (3, 2), padded=True).operands
    padded = grouped_attention(
        query, key, value, (3, 2), pad_key=pad_key, pad_value=pad_value, backend=backend
    )
    assert_same([padded], [grouped_attention(query, key, value, (3, 2), backend=backend)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_window_is_dense_attention(backend):
    maps = [random(2, 3, 4, 2, 5) for _ in range(3)]
    expected = neighborhood_attention(*maps, (3, 4), return_lse=True, backend="reference")
    assert_same(grouped_attention(*maps, 9, return_lse=True, backend=backend), expected)


def test_bias_uses_positions_in_the_full_window():
    query, key, value, *_ = grouped_problem((5,), (4,), heads=1).operands
    bias = torch.zeros(1, 4, 4, dtype=torch.float64)
    bias[0, 3, 2] = 1e3  # with shift 3 the first block holds positions 1, 2, 3
    output = grouped_attention(query, key, value, 4, 3, bias=bias)
    assert_same([output[:, 2]], [value[:, 1]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interval_splits_into_independent_maps(backend):
    maps = [random(1, 6, 8, 2, 4) for _ in range(3)]
    whole = grouped_attention(*maps, (3, 4), interval=(2, 2), backend=backend)
    for row in range(2):
        for column in range(2):
            part = [x[:, row::2, column::2] for x in maps]
            expected = grouped_attention(*part, (3, 4), backend=backend)
            assert_same([whole[:, row::2, column::2]], [expected])


@pytest.mark.parametrize("padded", [False, True])
def test_a_map_that_is_rolled_before_it_is_padded(padded):
    """Roll by hand, pad, and mask what was no neighbor in the last window, as Swin of timm does."""
    problem = grouped_problem((7,), (3,), bias=True, padded=padded, shift=(1,), rolled=True)
    found = on(None)(problem)[0]
    query, key, value = (x.roll(-1, 1) for x in (problem.query, problem.key, problem.value))
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])  # nine slots of which seven are tokens; the last is cut off
    slot = torch.arange(9) % 3
    keys, values = (pad(x, (0, 0, 0, 0, 0, 2)) for x in (key, value))
    if padded:
        keys[:, 7:], values[:, 7:] = problem.pad_key, problem.pad_value
    logits = torch.einsum("bnhd,bmhd->bhnm", query, keys) * 0.5 + problem.bias[:, slot[:7]][:, :, slot]
    seen = (group[:7, None] == group) & ((torch.arange(9) < 7) | padded)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    assert_same([found], [torch.einsum("bhnm,bmhd->bnhd", weights, values).roll(1, 1)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_additional_keys_join_every_group(backend):
    maps, more = [random(2, 4, 4, 2, 3) for _ in range(3)], [random(2, 3, 2, 3) for _ in range(2)]
    found = grouped_attention(*maps, 2, additional_keys=more[0], additional_values=more[1], backend=backend)
    corner = [x[:, :2, :2].flatten(1, 2) for x in maps]
    keys, values = (torch.cat(pair, dim=1) for pair in zip(corner[1:], more, strict=True))
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (corner[0], keys, values)))
    assert_same([found[:, :2, :2].flatten(1, 2).transpose(1, 2)], [expected])
