"""Attention in half precision, against the reference on the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, grouped_problem, local_problem, of_dtype, on, results

PROBLEMS = {
    "local": local_problem((8, 8), (3, 3), bias=True, additional=1),
    "grouped": grouped_problem((7, 7), (4, 4), bias=True, padded=True, shift=(2, 2)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", ["plain", "reference", "tiled"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)  # their rounding
def test_half_precision_keeps_float32_statistics(name, backend, dtype, tolerance):
    halves = of_dtype(PROBLEMS[name], dtype)
    actual = results(on(backend), halves)
    expected = results(on("reference"), of_dtype(halves, torch.float64))
    assert actual[1].dtype == torch.float32
    assert [x.dtype for x in actual[2:]] == [dtype] * 6
    assert_same(actual[1:2], expected[1:2], 1e-6)
    assert_same([x.double() for x in actual], expected, tolerance)
