"""Backend ``natten`` beside the reference: every case that it says it takes, where NATTEN is installed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from attention_cases import OPERATORS, assert_same, bare_problem
from guarded_layouts import guarded, layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.errors import BackendError
from attnrewrite.functional import neighborhood_attention
from attnrewrite.operators import LocalProblem
from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import refusals

IS_INSTALLED = find_spec("natten") is not None
OPERATOR = OPERATORS["local_attention"]
# Half precision rounds the weights of the softmax, too. Guards are larger than what float16 holds.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


@st.composite
def problems(draw) -> LocalProblem:
    torch.manual_seed(draw(st.integers(0, 1000)))
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(list(TOLERANCES)))
    kernel = tuple(draw(st.integers(2, 5 if rank < 3 else 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    more = 9 if rank < 3 else 2
    grid = tuple(k * d + draw(st.integers(0, more)) for k, d in zip(kernel, dilation, strict=True))
    batch, heads, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([8, 16, 32]))
    query, key, value = (torch.randn(batch, *grid, heads, channels).to(dtype) for _ in range(3))
    extra = [None, None]
    if draw(st.booleans()):
        extra = [torch.randn(batch, draw(st.just(3)), heads, channels).to(dtype) for _ in range(2)]
    stride, scale = tuple(draw(st.integers(1, k)) for k in kernel), draw(st.sampled_from([0.2, 1.0]))
    geometry = kernel, stride, dilation, (0,) * rank, tuple(draw(st.booleans()) for _ in range(rank)), "clamp", scale
    return LocalProblem(query, key, value, None, *extra, None, None, None, *geometry)


@pytest.mark.skipif(not IS_INSTALLED, reason="NATTEN is not installed")
@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_it_is_the_reference_on_all_that_it_takes(problem, data):
    refused = refusals(Request.of(problem))["natten"]
    if refused:
        assert "causal window over a whole sequence" in refused
        return
    places = [None if each is None else guarded(each, data.draw(layouts(each.dim()))) for each in problem.operands]
    given = [None if place is None else place.tensor for place in places]
    found = OPERATOR.forward(*given, *problem.geometry, "natten")
    expected = OPERATOR.forward(*(None if p is None else p.plain() for p in places), *problem.geometry, "reference")
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert_same([x.double() for x in found], [x.double() for x in expected], TOLERANCES[problem.query.dtype])
    assert all(place is None or place.is_untouched() for place in places)


REFUSED = {
    "slide inward": {"boundary": "mask"},
    "around their queries": {"stride": (2, 1), "offset": (1, 0)},
    "no bias": {"bias": torch.zeros(2, 5, 5)},
    "two places an axis": {"kernel_size": (3, 1)},
    "power of two": {"value": torch.zeros(1, 9, 9, 2, 16)},
    "not torch.float64": {name: torch.zeros(1, 9, 9, 2, 8, dtype=torch.float64) for name in ("query", "key", "value")},
}  # fmt: skip


@pytest.mark.skipif(not IS_INSTALLED, reason="NATTEN is not installed")
@pytest.mark.parametrize("reason", REFUSED)
def test_it_says_what_it_does_not_take(reason):
    maps = {name: torch.zeros(1, 9, 9, 2, 8) for name in ("query", "key", "value")}
    plain = replace(bare_problem("local_attention"), **maps, kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1),
                    offset=(0, 0), is_causal=(False, False))  # fmt: skip
    assert refusals(Request.of(plain))["natten"] is None
    assert reason in refusals(Request.of(replace(plain, **REFUSED[reason])))["natten"]
    assert "no backward" in refusals(Request.of(plain, needs_gradient=True))["natten"]


@pytest.mark.skipif(IS_INSTALLED, reason="NATTEN is installed")
def test_without_it_that_is_the_reason():
    tokens = torch.zeros(1, 8, 8, 2, 8)
    with pytest.raises(BackendError, match="requires natten, which is not installed"):
        neighborhood_attention(tokens, tokens, tokens, 3, backend="natten")
