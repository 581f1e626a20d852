"""The plain form of every operator is its definition, loop by loop, with all its derivatives."""

from __future__ import annotations

import pytest
from attention_cases import OPERATORS, PROBLEMS, SMALL, assert_same, results
from attention_oracle import ORACLES
from hypothesis import HealthCheck, assume, given, settings


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_the_definition(name, examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(PROBLEMS[name](SMALL))
    def compared(problem):
        assume(all(operand is None or operand.numel() for operand in problem.operands[:1]))
        problem.check()
        assert_same(results(type(problem).plain, problem), results(ORACLES[name], problem), 1e-9)

    compared()
