"""The convolutional gate of the native kernels, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.backends.native import ACTIVATIONS
from guarded_layouts import guarded, layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernels import kernels

from attnrewrite.operators import ConvGluProblem
from attnrewrite.operators.backend import Request
from attnrewrite.operators.conv_glu import CONV_GLU
from attnrewrite.operators.dispatch import refusals, select_backend


@st.composite
def problems(draw, dtype=torch.float32) -> ConvGluProblem:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    batch, side = draw(st.sampled_from([1, 2, 0])), draw(st.sampled_from([3, 5]))
    height, width = (draw(st.sampled_from([1, 2, 3, 4, 7, 12])) for _ in range(2))
    channels = draw(st.sampled_from([1, 3, 8, 16, 17, 32, 40, 70]))
    factor = draw(st.sampled_from([1.0, 1.0, 1e-4, 30.0]))
    shape = (batch, height, width, channels)
    gate, weight = factor * torch.randn(shape), torch.randn(channels, 1, side, side)
    bias = torch.randn(channels) if draw(st.booleans()) else None
    value = torch.randn(shape) if draw(st.booleans()) else None
    operands = [None if each is None else each.to(dtype) for each in (gate, weight, bias, value)]
    names = st.sampled_from(ACTIVATIONS)
    return ConvGluProblem(*operands, draw(names), draw(st.just("identity") | names))


def run(problem, backend, operands=None):
    operands = problem.operands if operands is None else operands
    return CONV_GLU.forward(*operands, *problem.geometry, backend)


def differentiated(problem, gradient, backend, operands=None, wanted=(True,) * 4):
    operands = problem.operands if operands is None else operands
    results = [torch.empty_like(gradient)]
    return CONV_GLU.backward(gradient, list(wanted), *operands, *results, *problem.geometry, backend)


def assert_close(found, expected, tolerance):
    """Relative to the largest of its numbers, or to 1."""
    assert found.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance * max(largest, 1.0), rtol=0)


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from([1, 2]))
def test_results_and_gradients_are_those_of_the_definition(problem, threads):
    torch.set_num_threads(threads)
    assert refusals(Request.of(problem, needs_gradient=True))["native"] is None
    output = _one(run(problem, "native"))
    assert_close(output, _one(run(problem, "reference")), 2e-6)
    gradient = torch.randn_like(output)
    gradients = (differentiated(problem, gradient, backend) for backend in ("native", "reference"))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 5e-6)


def _one(found):
    return found[0] if isinstance(found, tuple | list) else found


@settings(deadline=None, max_examples=40)
@given(problems(torch.bfloat16))
def test_half_precision_is_rounded_once(problem):
    output = _one(run(problem, "native"))
    assert output.dtype is torch.bfloat16
    assert_close(output, _one(run(problem, "reference")), 2**-8)


@settings(deadline=None, max_examples=60)
@given(problems(), st.data())
def test_operands_of_any_layout_are_read_and_nothing_beside_them(problem, data):
    places = [None if each is None else guarded(each, data.draw(layouts(each.dim()))) for each in problem.operands]
    laid_out, plain = ([get(p) if p else None for p in places] for get in (lambda p: p.tensor, lambda p: p.plain()))
    output = _one(run(problem, "native", plain))
    assert torch.equal(_one(run(problem, "native", laid_out)), output)
    gradient = torch.randn_like(output)
    wanted = [data.draw(st.booleans()) for _ in places]
    pairs = [differentiated(problem, gradient, "native", each, wanted) for each in (laid_out, plain)]
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))
    assert all(place is None or place.is_untouched() for place in places)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_where_the_definition_has_it(activation, poison):
    gate, value = torch.randn(1, 9, 8, 20), torch.randn(1, 9, 8, 20)
    gate[0, 4, 2, 3] = poison
    problem = ConvGluProblem(gate, torch.randn(20, 1, 3, 3), torch.randn(20), value, activation, "identity")
    output, expected = (_one(run(problem, backend)) for backend in ("native", "reference"))
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isinf(), expected.isinf())
    assert_close(output.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), 2e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_right_at_every_magnitude(activation):
    points = torch.cat([torch.linspace(-12, 12, 6000), torch.logspace(-30, 30, 400), -torch.logspace(-30, 30, 400)])
    identity = torch.zeros(1, 1, 3, 3)
    identity[..., 1, 1] = 1
    problem = ConvGluProblem(points.view(1, -1, 1, 1), identity, None, None, activation, "identity")
    output, expected = (_one(run(problem, backend)).double() for backend in ("native", "reference"))
    error = (output - expected).abs() / points.double().view_as(output).abs()
    assert float(error.max()) < 4e-7  # a share of the argument, rounded as a number up to 1
    pairs = (differentiated(problem, torch.ones_like(output).float(), b)[0].double() for b in ("native", "reference"))
    torch.testing.assert_close(*pairs, atol=2e-6, rtol=0)


def test_results_do_not_hang_on_the_number_of_threads():
    shape = (3, 20, 17, 100)
    problem = ConvGluProblem(torch.randn(shape), torch.randn(100, 1, 5, 5), torch.randn(100), torch.randn(shape),
                             "gelu", "relu")  # fmt: skip
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = _one(run(problem, "native"))
        found.append([output, *differentiated(problem, output, "native")])
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("3 x 3 or 5 x 5", {"weight": torch.zeros(8, 1, 7, 7)}),
        ("no activation 'mish'", {"activation": "mish"}),
        ("no activation 'elu'", {"pre_activation": "elu"}),
        ("not torch.float64", {n: torch.zeros(*s, dtype=torch.float64) for n, s in
                               (("gate", (1, 4, 4, 8)), ("weight", (8, 1, 3, 3)))}),
    ],
)  # fmt: skip
def test_what_it_is_not_written_for_is_said(reason, changes):
    given = {"gate": torch.zeros(1, 4, 4, 8), "weight": torch.zeros(8, 1, 3, 3), "bias": None, "value": None,
             "activation": "gelu", "pre_activation": "identity"}  # fmt: skip
    assert select_backend(Request.of(ConvGluProblem(**given))).name == "native"
    assert reason in refusals(Request.of(ConvGluProblem(**given | changes)))["native"]


WRONG = {
    "weight: filters must be": {"weight": torch.zeros(7, 7, 8)},
    "weight: has a shape": {"weight": torch.zeros(3, 3, 9)},
    "bias: has a shape": {"bias": torch.zeros(9)},
    "value: has a shape": {"value": torch.zeros(1, 4, 5, 8)},
    "value: has another dtype": {"value": torch.zeros(1, 4, 4, 8, dtype=torch.bfloat16)},
    "gate: its channels": {"gate": torch.zeros(1, 8, 4, 4).permute(0, 2, 3, 1)},
    "activation: the kernels have no": {"activation": "mish"},
}


@pytest.mark.parametrize("message", WRONG)
def test_operands_that_do_not_fit_are_refused(message):
    given = {"gate": torch.zeros(1, 4, 4, 8), "weight": torch.zeros(3, 3, 8), "bias": None, "value": None,
             "activation": "gelu", "pre_activation": "identity"}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        kernels.conv_glu(*(given | WRONG[message]).values())
