"""The native kernels as a backend: what they are chosen for, what they refuse, and that gradients come through."""

import pytest
import torch
from attnrewrite.backends import native
from attnrewrite.backends.native import library
from native_kernels import kernels

from attnrewrite.functional import local_attention, neighborhood_attention
from attnrewrite.lowering import refusals, select_backend
from attnrewrite.operators import LocalProblem
from attnrewrite.operators.backend import Request


def maps(dtype=torch.float32, **options):
    return [torch.randn(2, 12, 9, 3, 16, dtype=dtype, **options) for _ in range(3)]


def request(dtype=torch.float32, **changes) -> Request:
    geometry = {
        "kernel_size": (5, 5), "stride": (1, 1), "dilation": (1, 1), "offset": (0, 0), "is_causal": (False, False),
        "boundary": "clamp", "scale": 0.3,
    } | changes  # fmt: skip
    return Request.of(LocalProblem(*maps(dtype), *[None] * 6, **geometry))


def test_it_is_chosen_where_it_can_run():
    assert kernels.instruction_set() in ("avx512", "avx2", "baseline")
    assert select_backend(request()).name == "native"


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("float32 and bfloat16", {"dtype": torch.float64}),
        ("an odd size up to 13", {"kernel_size": (4, 5)}),
        ("no stride", {"stride": (2, 1)}),
        ("none that is causal", {"is_causal": (True, False)}),
    ],
)
def test_what_it_is_not_written_for_is_said(reason, changes):
    assert reason in refusals(request(**changes))["native"]


def test_without_kernels_the_next_backend_serves(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "its kernels are not built; build them")
    asked = request(kernel_size=(1, 7))
    assert native.NATIVE.refusal(asked) == "its kernels are not built; build them"
    assert select_backend(asked).name != "native"


@pytest.mark.parametrize("boundary", ["clamp", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_reference(boundary, dtype):
    """Also where none arrives at the log-sum-exp, and of an operand that wants none."""
    query, key, value = maps(dtype)
    bias = torch.randn(3, *((9, 9) if boundary == "clamp" else (5, 5)), dtype=dtype)
    leaves = [each.requires_grad_() for each in (query, value, bias)]
    found = {}
    for name in ("native", "reference"):
        output = local_attention(query, key, value, 5, boundary=boundary, bias=bias, backend=name)
        found[name] = torch.autograd.grad(output, leaves, torch.ones_like(output))
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours.dtype is dtype
        tolerance = 1e-4 if dtype is torch.float32 else 2**-6
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def test_negated_views_are_read_with_their_sign():
    query, key, value = maps()
    plain = neighborhood_attention(-query, key, value, 3, backend="native")
    assert torch.equal(neighborhood_attention(torch._neg_view(query), key, value, 3, backend="native"), plain)
