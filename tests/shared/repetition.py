"""Parametrized tests of which the default run has a part only: what is left out repeats what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

Param = type(pytest.param())


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """Every ``every``-th case in the default run, the others in the long one.

    A tuple holds the values of several arguments; a single value that is a tuple is given as a ``pytest.param``.
    """
    params = [_param(case) for case in cases]
    return [
        pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow]) if place % every else param
        for place, param in enumerate(params)
    ]


def _param(case: Any) -> Any:
    if isinstance(case, Param):  # a tuple itself
        return case
    return pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)
