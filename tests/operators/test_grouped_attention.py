"""Grouped attention: against loops, against rolled and masked windows, and identities."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, grouped_axes, grouped_operands, random, results
from attention_oracle import windows
from attnrewrite.backends.tiled import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad, scaled_dot_product_attention

from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators import grouped_attention as operator

BACKENDS = ["reference", "tiled"]


@st.composite
def cases(draw, longest):
    rank = draw(st.integers(1, 3))
    grid, window, shift = zip(*(draw(grouped_axes(longest[rank])) for _ in range(rank)), strict=True)
    torch.manual_seed(draw(st.integers(0, 1000)))
    operands = grouped_operands(
        grid,
        window,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        value_dim=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        padded=draw(st.booleans()),
    )
    return operands, (window, shift, draw(st.sampled_from([0.5, 1.0])))


def on(backend, geometry):
    return lambda *tensors: operator(*tensors, *geometry, backend)


def oracle(geometry):
    def run(query, key, value, bias, pad_key, pad_value):
        return windows(query, key, value, *geometry, bias, pad_key, pad_value)

    return run


@settings(max_examples=25, deadline=None)
@given(cases(longest={1: 10, 2: 5, 3: 3}))
def test_reference_is_the_definition(case):
    operands, geometry = case
    assert_same(results(on("reference", geometry), operands), results(oracle(geometry), operands))


@settings(max_examples=60, deadline=None)
@given(cases(longest={1: 30, 2: 12, 3: 7}), st.sampled_from([1, 3000, 1 << 22]))
def test_tiles_are_the_reference(case, run_bytes):
    operands, geometry = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.RUN_BYTES, "cpu", run_bytes)
        tiled = results(on("tiled", geometry), operands)
    assert_same(tiled, results(on("reference", geometry), operands))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradcheck(backend, padded):
    operands = grouped_operands((4, 3), (2, 2), heads=1, dim=2, value_dim=2, bias=True, padded=padded)
    given = [operand.requires_grad_() for operand in operands if operand is not None]
    absent = (None,) * (6 - len(given))
    assert torch.autograd.gradcheck(lambda *x: operator(*x, *absent, (2, 2), (1, 0), 0.7, backend), given)


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
    operands = grouped_operands(grid, (4, 4), batch=2, value_dim=3, bias=True, padded=True)
    query, key, value, bias, pad_key, pad_value = operands
    output = grouped_attention(
        query, key, value, 4, shift, bias=bias, pad_key=pad_key, pad_value=pad_value, backend=backend
    )
    assert_same([output], [rolled_windows(query, key, value, 4, shift, bias, pad_key, pad_value)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_keys_of_zero_are_zero_padding(backend):
    query, key, value, *_ = grouped_operands((6, 6), (4, 4), value_dim=3)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    with_zeros = grouped_attention(query, key, value, 4, pad_key=zero, pad_value=zero, backend=backend)
    padded = [pad(x, (0, 0, 0, 0, 0, 2, 0, 2)) for x in (query, key, value)]
    assert_same([with_zeros], [grouped_attention(*padded, 4, backend=backend)[:, :6, :6]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_matter_on_a_divisible_map(backend):
    query, key, value, _, pad_key, pad_value = grouped_operands((6, 4), (3, 2), padded=True)
    padded = grouped_attention(
        query, key, value, (3, 2), pad_key=pad_key, pad_value=pad_value, backend=backend
    )
    assert_same([padded], [grouped_attention(query, key, value, (3, 2), backend=backend)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_window_is_dense_attention(backend):
    maps = [random(2, 3, 4, 2, 5) for _ in range(3)]
    expected = neighborhood_attention(*maps, (3, 4), return_lse=True, backend="reference")
    assert_same(grouped_attention(*maps, 9, return_lse=True, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)  # their rounding
def test_half_precision_keeps_float32_statistics(backend, dtype, tolerance):
    halves = [x.to(dtype) for x in grouped_operands((7, 7), (4, 4), bias=True, padded=True)]
    geometry = ((4, 4), (2, 2), 0.5)
    actual = results(on(backend, geometry), halves)
    expected = results(on("reference", geometry), [x.double() for x in halves])
    assert actual[1].dtype == torch.float32
    assert_same(actual[1:2], expected[1:2], 1e-6)
    assert_same([x.double() for x in actual], expected, tolerance)


def test_bias_uses_positions_in_the_full_window():
    query, key, value, *_ = grouped_operands((5,), (4,), heads=1)
    bias = torch.zeros(1, 4, 4, dtype=torch.float64)
    bias[0, 3, 2] = 1e3  # with shift 3 the first block holds positions 1, 2, 3
    output = grouped_attention(query, key, value, 4, 3, bias=bias)
    assert_same([output[:, 2]], [value[:, 1]])
