"""Local attention of the native kernels, against its definition in float64."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from attnrewrite.backends.native import build
from guarded_layouts import guarded, layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from local_oracle import OPERANDS, Local, attention
from native_kernels import kernels
from plugins import run
from torch import Tensor

Case = tuple[dict[str, Tensor | None], Local]


@st.composite
def cases(draw, dtype=torch.float32) -> Case:
    """Small problems of every kind; which operands are there, and what they hold, is drawn as well."""
    rank, slides = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.booleans())
    sizes = (1, 3, 5, 7, 9, 11, 13) if rank < 3 else (1, 3)
    kernel = tuple(draw(st.sampled_from(sizes)) for _ in range(rank))
    dilation = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(rank))
    least = [size * step if slides else 1 for size, step in zip(kernel, dilation, strict=True)]
    most = {1: 40, 2: 18, 3: 5}[rank]
    grid = tuple(draw(st.integers(lowest, max(most, lowest + 1))) for lowest in least)
    batch, heads = draw(st.sampled_from([1, 1, 2, 0])), draw(st.integers(1, 2))
    channels, value_channels = (draw(st.sampled_from([1, 3, 8, 16, 20, 33])) for _ in range(2))
    extras = draw(st.sampled_from([0, 0, 1, 9]))
    table = [2 * size - 1 if slides else size for size in kernel]
    shapes = {
        "query": (batch, *grid, heads, channels),
        "key": (batch, *grid, heads, channels),
        "value": (batch, *grid, heads, value_channels),
        "bias": (heads, *table),
        "extra_key": (batch, extras, heads, channels),
        "extra_value": (batch, extras, heads, value_channels),
        "extra_bias": (heads, *grid, extras),
        "place_bias": (heads, *grid, prod(kernel)),
        "post": (batch, *grid, heads, prod(kernel)),
    }
    absent = {name for name in ("bias", "place_bias", "post") if draw(st.booleans())}
    absent |= {"extra_key", "extra_value", "extra_bias"} if extras == 0 else set()
    absent |= {"extra_bias"} if draw(st.booleans()) else set()
    magnitude = draw(st.sampled_from([1.0, 1.0, 1e-4, 6.0]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    operands = {
        name: None if name in absent else (magnitude * torch.randn(shape)).to(dtype) for name, shape in shapes.items()
    }
    if operands["bias"] is not None:
        operands["bias"] = operands["bias"].float()
    return operands, Local(kernel, dilation, slides)


def native(operands: dict[str, Tensor | None], local: Local) -> tuple[Tensor, Tensor]:
    return kernels.local_attention(*arguments(operands, local))


def native_gradients(operands, local, grad_output, grad_lse) -> dict[str, Tensor]:
    found = kernels.local_attention_backward(grad_output, grad_lse, *arguments(operands, local))
    return dict(zip(OPERANDS, found, strict=True))


def arguments(operands, local):
    tensors = (operands[name] for name in OPERANDS)
    return (*tensors, list(local.kernel_size), list(local.dilation), local.slides, local.scale)


def exact(operands, local, grad_output=None, grad_lse=None):
    """Results in float64, and gradients of the operands that are there."""
    doubles = {name: None if each is None else each.double().requires_grad_() for name, each in operands.items()}
    results = attention(doubles, local)
    if grad_output is None:
        return results
    live = [name for name in OPERANDS if doubles[name] is not None]
    gradients = (grad_output.double(), grad_lse.double())
    found = torch.autograd.grad(results, [doubles[name] for name in live], gradients)
    return results, dict(zip(live, found, strict=True))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest of its numbers, or to 1."""
    assert found.shape == expected.shape
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.detach(), atol=tolerance * max(largest, 1.0), rtol=0)


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from([1, 2]))
def test_results_and_gradients_are_those_of_the_definition(case, threads):
    operands, local = case
    torch.set_num_threads(threads)
    output, lse = native(operands, local)
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    found = native_gradients(operands, local, grad_output, grad_lse)
    (expected, expected_lse), gradients = exact(operands, local, grad_output, grad_lse)
    assert_close(output, expected, 3e-5)
    assert_close(lse, expected_lse, 3e-5)
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, 1e-4)
    assert all(found[name].numel() == 0 for name in OPERANDS if operands[name] is None)


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 13])
def test_keys_that_both_borders_stop_windows_at_hear_of_all_their_queries(size):
    """On maps of less than two windows up to ``2 * size - 1`` rows of queries see one row of keys."""
    for length in range(size, 2 * size + 2):
        for kernel, grid in (((size,), (length,)), ((size, 1), (length, 3)), ((size, size, 1), (length, length, 2))):
            names = ("query", "key", "value")
            operands = dict.fromkeys(OPERANDS) | {each: torch.randn(1, *grid, 1, 3) for each in names}
            local = Local(kernel, (1,) * len(kernel), True)
            (output, _), gradients = exact(operands, local, operands["value"], operands["value"][..., 0])
            found = native_gradients(operands, local, operands["value"], operands["value"][..., 0])
            assert_close(native(operands, local)[0], output, 3e-5)
            for name in names:
                assert_close(found[name], gradients[name], 1e-4)


@settings(deadline=None, max_examples=40)
@given(cases(torch.bfloat16))
def test_half_precision_is_rounded_once(case):
    """Everything between is float32: the output is off by its own rounding, gradients (in float32) by less."""
    operands, local = case
    output, lse = native(operands, local)
    grad_output = torch.randn_like(output)
    found = native_gradients(operands, local, grad_output, torch.randn_like(lse))
    (expected, expected_lse), _ = exact(operands, local, grad_output, lse)
    assert output.dtype is torch.bfloat16
    assert_close(output, expected, 2**-8)
    assert_close(lse, expected_lse, 3e-5)
    assert found["query"].dtype is torch.float32


@settings(deadline=None, max_examples=60)
@given(cases(), st.data())
def test_operands_of_any_layout_are_read_and_nothing_beside_them(case, data):
    operands, local = case
    places = {}
    for name, operand in operands.items():
        if operand is None or name == "bias":
            continue
        places[name] = guarded(operand, data.draw(layouts(operand.dim()), label=name))
    given = operands | {name: place.tensor for name, place in places.items()}
    plain = operands | {name: place.plain() for name, place in places.items()}
    for found, expected in zip(native(given, local), native(plain, local), strict=True):
        assert torch.equal(found, expected)
    output, lse = native(plain, local)
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    ours = native_gradients(given, local, grad_output, grad_lse)
    for name, expected in native_gradients(plain, local, grad_output, grad_lse).items():
        assert torch.equal(ours[name], expected)
    assert all(place.is_untouched() for place in places.values())


@pytest.mark.parametrize("slides", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_not_finite_stays_with_the_queries_that_see_it(name, poison, slides):
    local = Local((5, 3), (1, 2), slides)
    operands = dict.fromkeys(OPERANDS) | {each: torch.randn(1, 9, 19, 2, 16) for each in ("query", "key", "value")}
    operands[name][0, 2, 5, 1, 3] = poison
    output, lse = native(operands, local)
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    found = native_gradients(operands, local, grad_output, grad_lse)
    (expected, expected_lse), gradients = exact(operands, local, grad_output, grad_lse)
    pairs = ((found[each], gradients[each]) for each in gradients)
    for ours, theirs in ((output, expected), (lse, expected_lse), *pairs):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert_close(ours.where(ours.isfinite(), 0), theirs.where(theirs.isfinite(), 0), 3e-5)


def test_a_query_that_sees_nothing_has_no_output():
    local = Local((3, 3), (1, 1), False)
    operands = dict.fromkeys(OPERANDS) | {each: torch.randn(1, 4, 4, 1, 8) for each in ("query", "key", "value")}
    operands["place_bias"] = torch.zeros(1, 4, 4, 9)
    operands["place_bias"][0, 1, 2] = -torch.inf
    output, lse = native(operands, local)
    assert output[0, 1, 2].isnan().all()
    assert lse[0, 1, 2] == -torch.inf
    assert output.isnan().sum() == 8


def test_logits_of_any_magnitude_are_attended_to():
    local = Local((7, 7), (1, 1), True, scale=1.0)
    operands = dict.fromkeys(OPERANDS) | {each: torch.randn(1, 9, 9, 1, 4) for each in ("query", "key", "value")}
    for factor in (1e-30, 1e3, 1e15):
        output, lse = native(operands | {"query": operands["query"] * factor}, local)
        expected, expected_lse = exact(operands | {"query": operands["query"] * factor}, local)
        assert_close(output, expected, 1e-3)  # at 1e3 a logit is rounded to 1e-4, and so is what its weight is off by
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)


def test_results_do_not_hang_on_the_number_of_threads():
    local = Local((7, 7), (1, 1), True)
    operands = dict.fromkeys(OPERANDS) | {each: torch.randn(1, 30, 20, 3, 16) for each in ("query", "key", "value")}
    operands |= {"bias": torch.randn(3, 13, 13)}
    operands |= {each: torch.randn(1, 4, 3, 16) for each in ("extra_key", "extra_value")}
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, lse = native(operands, local)
        found.append([output, lse, *native_gradients(operands, local, output, lse).values()])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))


WRONG = {
    "query: must be float32": {"query": torch.zeros(1, 8, 8, 2, 4, dtype=torch.float64)},
    "key: has a shape": {"key": torch.zeros(1, 8, 7, 2, 4)},
    "value: has a shape": {"value": torch.zeros(1, 8, 8, 3, 4)},
    "value: must have as many": {"value": torch.zeros(8, 8, 2, 4)},
    "key: has another dtype": {"key": torch.zeros(1, 8, 8, 2, 4, dtype=torch.bfloat16)},
    "give both": {"extra_key": torch.zeros(1, 3, 2, 4)},
    "extra_bias: has a shape": {
        "extra_key": torch.zeros(1, 3, 2, 4),
        "extra_value": torch.zeros(1, 3, 2, 4),
        "extra_bias": torch.zeros(2, 8, 8, 2),
    },
    "post: has a shape": {"post": torch.zeros(1, 8, 8, 2, 8)},
    "place_bias: has a shape": {"place_bias": torch.zeros(1, 8, 8, 9)},
    "bias: has a shape": {"bias": torch.zeros(2, 3, 3)},
    "bias: must be contiguous": {"bias": torch.zeros(5, 5, 2).permute(2, 0, 1)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_operands_that_do_not_fit_are_refused(message):
    operands = dict.fromkeys(OPERANDS) | {each: torch.zeros(1, 8, 8, 2, 4) for each in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match=message):
        native(operands | WRONG[message], Local((3, 3), (1, 1), True))


WRONG_WINDOWS = [((4, 3), (1, 1)), ((15, 3), (1, 1)), ((3, 3), (3, 1)), ((3,), (1,)), ((3, 3), (0, 1))]


@pytest.mark.parametrize(("kernel", "dilation"), WRONG_WINDOWS)
def test_windows_that_do_not_fit_are_refused(kernel, dilation):
    operands = dict.fromkeys(OPERANDS) | {each: torch.zeros(1, 8, 8, 2, 4) for each in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match=r"kernel_size|dilation"):
        native(operands, Local(kernel, dilation, True))


@pytest.mark.parametrize("instruction_set", build.instruction_sets())
def test_every_instruction_set_attends_alike(instruction_set, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_INSTRUCTION_SET", instruction_set)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    code = f"""
import sys, torch
sys.path += {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]!r}
from native_kernels import kernels
from local_oracle import OPERANDS, Local, attention
torch.manual_seed(0)
worst = 0.0
for slides in (True, False):
    for side, size, dilation in ((20, 7, 1), (9, 3, 2), (14, 13, 1)):
        shape = (1, side, side + 3, 2, 20)
        operands = dict.fromkeys(OPERANDS) | {{name: torch.randn(shape) for name in ("query", "key", "value")}}
        doubles = {{name: None if each is None else each.double().requires_grad_() for name, each in operands.items()}}
        local = Local((size, size), (dilation, dilation), slides)
        expected = attention(doubles, local)
        rest = (*operands.values(), [size] * 2, [dilation] * 2, slides, local.scale)
        output, lse = kernels.local_attention(*rest)
        leaves = [doubles[name] for name in ("query", "key", "value")]
        gradients = torch.autograd.grad(expected, leaves, (output.double(), lse.double()))
        found = kernels.local_attention_backward(output, lse, *rest)
        pairs = [(output, expected[0]), (lse, expected[1]), *zip(found, gradients)]
        worst = max(worst, *(float((one - other).abs().max() / other.abs().max()) for one, other in pairs))
print(kernels.instruction_set(), worst)
"""
    name, worst = run(code, tmp_path).split()
    if name != instruction_set:
        pytest.skip(f"this processor has no {instruction_set}")
    assert float(worst) < 1e-5
