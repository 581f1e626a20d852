"""The arithmetic that all native kernels share, on every instruction set of this processor."""

import numpy as np
import pytest
import torch
from attnrewrite.backends.native import build
from native_kernels import kernels
from plugins import run


def test_the_exponential_is_within_two_units_in_the_last_place():
    source = torch.linspace(-87.3, 88.3, 1_000_003)
    exact = source.double().exp()
    unit = np.spacing(exact.float().numpy()).astype(np.float64)
    error = (kernels.exponential(source).double() - exact).abs().numpy() / unit
    assert error.max() <= 2


def test_the_exponential_of_what_is_no_number_or_out_of_range():
    source = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 89.0, -88.0, 1e38, -1e38, 1e-40])
    assert kernels.exponential(source).tolist()[1:] == [float("inf"), 0, 1, 1, float("inf"), 0, float("inf"), 0, 1]
    assert kernels.exponential(source)[0].isnan()


@pytest.mark.parametrize("instruction_set", build.instruction_sets())
def test_every_instruction_set_gives_the_same(instruction_set, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_INSTRUCTION_SET", instruction_set)
    code = """
import torch
from attnrewrite.backends.native import library
assert library.missing() is None
source = torch.linspace(-20, 20, 1003)
ratio = library.kernels().exponential(source).double() / source.double().exp()
print(library.kernels().instruction_set(), bool((ratio - 1).abs().max() < 3e-7))
"""
    name, close = run(code, tmp_path).split()
    if name != instruction_set:
        pytest.skip(f"this processor has no {instruction_set}")
    assert close == "True"


def test_only_contiguous_float32_is_taken():
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(4, 4).T):
        with pytest.raises(RuntimeError, match="source: "):
            kernels.exponential(wrong)
