"""Converted models in half precision, exported with a dynamic batch, and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from conversions import Case, case_name, converted, copied
from repetition import thinned
from target_donors import distance, donor, images, logits
from torch.export import Dim

import attnrewrite

VITS: list[Case] = [
    ("vit", "aggregated", {"pool": 2}),
    ("vit", "manhattan", {"decay": 0.8}),
    ("vit", "manhattan_decomposed", {}),
    ("vit", "long_short_distance", {"group_size": 3}),
    ("vit", "neighborhood", {"kernel_size": 3}),
]
OTHERS: list[Case] = [
    ("swin", "neighborhood", {"kernel_size": 3}),
    ("swin, padded", "long_short_distance", {"shifted": "long"}),
    ("pvt v2", "aggregated", {"local_bias": 0.0}),
    ("pvt v2", "manhattan", {"reduced_keys": "keep", "decay": 0.8}),
]
CASES = pytest.mark.parametrize("case", VITS + OTHERS, ids=case_name)
HALVES = [
    pytest.param(dtype, tolerance, case, id=f"{dtype}-{tolerance}-{case_name(case)}", marks=marks)
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2))
    for cases, marks in ((VITS, ()), (OTHERS, pytest.mark.slow))
    for case in cases
]


@pytest.mark.parametrize(("dtype", "tolerance", "case"), thinned(HALVES, 2))
def test_half_precision_is_near_and_trains(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """A model converted in half precision, and one cast after conversion."""
    name, target, options = case
    exact, batch = logits(converted(case), images(name)), images(name, dtype=dtype)
    plain = copy.deepcopy(donor(name)).to(dtype)
    for model in (attnrewrite.convert(plain, target, images(name, dtype=dtype), **options), copied(case).to(dtype)):
        output = model(batch)
        assert output.dtype == dtype
        assert distance(output.detach().double(), exact) <= tolerance
        output.float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@CASES
def test_export_with_a_dynamic_batch(case: Case) -> None:
    model = converted(case)
    exported = torch.export.export(
        model, (images(case[0], 2),), dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}}, strict=False
    )
    batch = images(case[0], 5, seed=3)
    assert distance(logits(exported.module(), batch), logits(model, batch)) <= 1e-12


@pytest.mark.slow
@CASES
def test_compiled_models_compute_the_same(case: Case) -> None:
    torch.compiler.reset()
    batch = images(case[0], 2, seed=3)
    compiled = torch.compile(copied(case), backend="aot_eager", fullgraph=True)
    assert distance(logits(compiled, batch), logits(converted(case), batch)) <= 1e-12
