"""Operators that are defined once for layers and cores: identities between them, layouts, errors, costs as formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sympy import Integer, expand, symbols

from attnrewrite.errors import ArgumentError
from attnrewrite.functional import axial_attention, biased_attention, conv_glu, grouped_attention, soft_split
from attnrewrite.operators.aggregated_attention import (
    AggregatedGeometry,
    AggregatedProblem,
    LearnedTokens,
    LocalKeys,
    SharedKeys,
    aggregated_attention,
)
from attnrewrite.operators.index_rule import relative_offset
from attnrewrite.operators.manhattan_attention import ManhattanGeometry, manhattan_attention
from attnrewrite.operators.soft_split import PatchGrid

HEADS, DIM = 2, 3
H, W, C, P = symbols("H W C P", positive=True, integer=True)


def operands(*places: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, *places, HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of heads-last sequences."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * DIM**-0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def scattered(source: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order in memory."""
    return source.transpose(0, -1).contiguous().transpose(0, -1)


def test_a_window_as_large_as_the_map_is_dense_attention():
    query, key, value = operands(3, 4)
    whole = AggregatedProblem(query * DIM**-0.5, LocalKeys(key, value, 7))
    shared = AggregatedProblem(query * DIM**-0.5, shared=SharedKeys(key.flatten(1, 2), value.flatten(1, 2)))
    expected = dense(*(part.flatten(1, 2) for part in (query, key, value))).unflatten(1, (3, 4))
    for problem in (whole, shared):
        torch.testing.assert_close(aggregated_attention(problem), expected, rtol=0, atol=1e-12)


def test_without_decay_manhattan_attention_is_dense_whatever_its_form():
    query, key, value = operands(2 + 12)
    none = torch.zeros(HEADS, dtype=torch.float64)
    expected = dense(query, key, value)
    for placement in ("inside", "outside"):
        geometry = ManhattanGeometry(3, 4, prefix_tokens=2, placement=placement)
        found = manhattan_attention(query, key, value, none, geometry)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_decay_towards_a_coarser_map_is_measured_to_the_centers_of_its_cells():
    query, key, value = *operands(4, count=1), *operands(2, count=2)
    decay = torch.tensor([-0.3, -0.7], dtype=torch.float64)
    found = manhattan_attention(query, key, value, decay, ManhattanGeometry(1, 4, keys=(1, 2)))
    distance = (torch.arange(4.0, dtype=torch.float64)[:, None] - torch.tensor([0.5, 2.5], dtype=torch.float64)).abs()
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * DIM**-0.5 + decay[:, None, None] * distance
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_any_layout():
    query, key, value = operands(4, 6)
    decay = torch.tensor([-0.3, -0.7], dtype=torch.float64)
    learned = LearnedTokens(query, *(torch.randn(HEADS, size, 9, dtype=torch.float64) for size in (DIM, 1)))

    def results(query, key, value):
        shared = SharedKeys(key[:, 0], value[:, 0])
        yield aggregated_attention(AggregatedProblem(query, LocalKeys(key, value, 3), shared, learned))
        yield manhattan_attention(query, key, value, decay, ManhattanGeometry(4, 6))
        yield manhattan_attention(query, key, value, decay, ManhattanGeometry(4, 6, decomposed=True))
        yield grouped_attention(query, key, value, (2, 3), interval=(2, 2))

    others = results(*map(scattered, (query, key, value)))
    for expected, found in zip(results(query, key, value), others, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_soft_split_is_a_map_of_unfolded_patches(normalized):
    image, patches = torch.randn(2, 3, 9, 12, dtype=torch.float64), PatchGrid(3, 2, 1)
    weight, bias = torch.randn(5, 27, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    factors, offsets = torch.randn(2, 27, dtype=torch.float64)
    tokens = F.unfold(image, 3, padding=1, stride=2).transpose(1, 2)
    tokens = F.layer_norm(tokens, (27,), factors, offsets, 1e-5) if normalized else tokens
    norm = {"norm_weight": factors, "norm_bias": offsets} if normalized else {}
    found = soft_split(image, weight, bias, 3, 2, 1, **norm)
    assert found.shape[1:3] == (patches.cells(9), patches.cells(12))
    torch.testing.assert_close(found.flatten(1, 2), F.linear(tokens, weight, bias), rtol=0, atol=1e-9)


def test_a_norm_of_patches_survives_a_large_mean():
    """In float32, of pixels a thousand times as large as their contrast; the mean of a square is a million."""
    image = torch.rand(1, 3, 9, 9) + 1000
    weight, ones = torch.randn(4, 27), torch.ones(27)
    found = soft_split(image, weight, None, 3, 2, 0, norm_weight=ones, norm_bias=torch.zeros(27))
    patches = F.unfold(image.double(), 3, stride=2).transpose(1, 2)
    expected = F.linear(F.layer_norm(patches, (27,), eps=1e-5), weight.double())
    torch.testing.assert_close(found.flatten(1, 2).double(), expected, rtol=0, atol=2e-3)


def test_a_gate_is_a_convolution_of_the_map():
    gate, value = operands(4, 6, count=2)
    gate, value = gate.flatten(3), value.flatten(3)
    channels = gate.shape[-1]
    convolution = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels, dtype=torch.float64)
    found = conv_glu(gate, convolution.weight, convolution.bias, value)
    expected = F.gelu(convolution(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) * value
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_table_by_position_is_a_bias_of_queries_and_keys():
    query, key, value = operands(2 + 12)
    table = torch.randn(HEADS, 5, 7, dtype=torch.float64)
    found = biased_attention(query, key, value, (3, 4), prefix_tokens=2, table=table)
    bias = F.pad(table.flatten(1)[:, relative_offset((3, 4))], (2, 0, 2, 0))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * DIM**-0.5 + bias
    torch.testing.assert_close(found, torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value), rtol=0, atol=1e-12)


def test_rows_then_columns_are_decomposed_manhattan_attention():
    query, key, value = operands(4, 6)
    decay = torch.tensor([-0.3, -0.7], dtype=torch.float64)
    rows = axial_attention(query, key, value, 1, log_decay=decay)
    found = axial_attention(query, key, rows, 0, log_decay=decay)
    expected = manhattan_attention(query, key, value, decay, ManhattanGeometry(4, 6, decomposed=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: aggregated_attention(AggregatedProblem(q)), "no key in the softmax"),
        (lambda q, k, v: aggregated_attention(AggregatedProblem(q, LocalKeys(k, v, 4))), "window_size: must be odd"),
        (lambda q, k, v: aggregated_attention(AggregatedProblem(q, LocalKeys(k, v, 3, in_softmax=False))), "no key in"),
        (
            lambda q, k, v: aggregated_attention(
                AggregatedProblem(q, shared=SharedKeys(k[:, 0], v[:, 0]), learned=LearnedTokens(q, q, q))
            ),
            "learned: tokens weigh",
        ),
        (lambda q, k, v: manhattan_attention(q, k, v, q[0, 0, 0, :, 0], ManhattanGeometry(4, 5)), "20 queries"),
        (
            lambda q, k, v: manhattan_attention(
                q, k, v, q[0, 0, 0, :, 0], ManhattanGeometry(4, 6, decomposed=True), bias=q
            ),
            "need the full form",
        ),
        (
            lambda q, k, v: manhattan_attention(
                q, k, v, q[0, 0, 0, :, 0], ManhattanGeometry(4, 6, placement="outside", dropout=0.1)
            ),
            "dropout: only",
        ),
    ],
)
def test_arguments_without_meaning(call, reason):
    with pytest.raises(ArgumentError, match=reason):
        call(*operands(4, 6))


def test_costs_are_formulas_of_symbols_too():
    """As the papers state them, with C channels of all heads together and N = H W."""
    tokens = H * W
    aggregated = AggregatedGeometry(H, W, 1, C, C, 3, P, learned=True).macs()
    assert expand(aggregated - (2 * tokens * P * C + 3 * tokens * 9 * C)) == 0
    focused = AggregatedGeometry(H, W, 1, C, C, 3, P).macs()
    assert expand(focused - (2 * tokens * P * C + 2 * tokens * 9 * C)) == 0
    assert expand(ManhattanGeometry(H, W).macs(1, C, C) - 2 * tokens**2 * C) == 0
    assert expand(ManhattanGeometry(H, W, decomposed=True).macs(1, C, C) - 2 * tokens * (H + W) * C) == 0
    assert expand(ManhattanGeometry(H, W, keys=(1, P)).macs(1, C, C) - 2 * tokens * P * C) == 0
    assert PatchGrid(7, 4, 2).macs(tokens, Integer(3), C) == 147 * tokens * C


def test_the_cost_of_a_problem_is_that_of_its_tensors():
    query, key, value = operands(4, 6)
    learned = LearnedTokens(query, *(torch.zeros(HEADS, size, 9, dtype=torch.float64) for size in (DIM, 1)))
    problem = AggregatedProblem(query, LocalKeys(key, value, 3), SharedKeys(key[:, 0], value[:, 0]), learned)
    assert problem.geometry == AggregatedGeometry(4, 6, HEADS, DIM, DIM, 3, 6, learned=True)
    assert problem.geometry.macs() == 24 * HEADS * DIM * (2 * 6 + 3 * 9)
