"""Every operator on every backend, with operands of any layout and dtype, is the reference of contiguous ones, forward
and backward; and nothing else of their storages is touched."""

from __future__ import annotations

import pytest
import torch
from attention_cases import OPERATORS, PROBLEMS, assert_same, bare_problem, of_dtype, random
from guarded_layouts import guarded, layouts
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import available_backends, refusals

# Rounding: of sums, and in bfloat16 of what the backward is given of the forward, where 2 ** -9 of a product of values
# of size 3 over 17 channels is a tenth; a wrong stride is of the size of the values.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.1}
BARE = {name: refusals(Request.of(bare_problem(name), needs_gradient=True)) for name in OPERATORS}
PAIRS = [(name, backend) for name in OPERATORS for backend in available_backends() if BARE[name][backend] is None]


def test_every_operator_has_backends():
    assert set(PROBLEMS) == set(OPERATORS)
    assert {(name, backend) for name in OPERATORS for backend in ("plain", "reference")} <= set(PAIRS)
    attentions = ("local_attention", "grouped_attention", "biased_attention", "axial_attention")
    assert {(name, "tiled") for name in attentions} <= set(PAIRS)


class Storages:
    """Tensors in drawn layouts, each beside a contiguous copy."""

    def __init__(self, data):
        self.data, self.all = data, []

    def lay_out(self, tensors, may_expand=True):
        """Contiguous copies of what the drawn layouts hold, and those; None stays None."""
        pairs = []
        for values in tensors:
            if values is None:
                pairs.append((None, None))
                continue
            made = guarded(values, self.data.draw(layouts(values.dim(), may_expand)))
            self.all.append(made)
            pairs.append((made.plain(), made.tensor))
        return zip(*pairs, strict=True)

    def are_untouched(self):
        return all(each.is_untouched() for each in self.all)


@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_any_layout_is_the_reference_of_contiguous_tensors(name, backend, examples):
    # A backend may refuse most options.
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def compared(data):
        compare_layouts(data.draw(PROBLEMS[name]()), backend, data)

    compared()


def compare_layouts(problem, backend, data):
    operator, dtype = OPERATORS[problem.name], data.draw(st.sampled_from(list(TOLERANCES)))
    problem = of_dtype(problem, dtype)
    problem.check()
    assume(refusals(Request.of(problem, needs_gradient=True))[backend] is None)
    storages = Storages(data)

    def compare(actual, expected):
        actual, expected = _tuple(actual), _tuple(expected)
        assert [(x.dtype, x.is_contiguous()) for x in actual] == [(x.dtype, True) for x in expected]
        assert_same([x.double() for x in actual], [x.double() for x in expected], TOLERANCES[dtype])
        assert storages.are_untouched()

    plain, laid_out = storages.lay_out(problem.operands)
    expected = _tuple(operator.forward(*plain, *problem.geometry, "reference"))
    compare(operator.forward(*laid_out, *problem.geometry, backend), expected)

    # Fused kernels serve gradients that arrive at the output alone.
    arrives = data.draw(st.sampled_from([(True, False), (True, True), (False, True)])) if len(expected) > 1 else (True,)
    gradients = [random(*x.shape).to(x) if does else None for x, does in zip(expected, arrives, strict=True)]
    wanted = data.draw(st.just([True] * len(plain)) | st.lists(st.booleans(), min_size=len(plain), max_size=len(plain)))
    plain_gradients, gradients = storages.lay_out(gradients)
    plain_results, results = storages.lay_out(expected, may_expand=False)
    compare(
        operator.backward(*gradients, wanted, *laid_out, *results, *problem.geometry, backend),
        operator.backward(*plain_gradients, wanted, *plain, *plain_results, *problem.geometry, "reference"),
    )


def _tuple(found):
    return found if isinstance(found, tuple | list) else (found,)


PACKINGS = {
    "channels first": lambda packed: packed.view(2, 3, 2, 8, 14, 14).permute(1, 0, 4, 5, 2, 3),
    "behind the channels": lambda packed: packed.view(2, 14, 14, 2, 8, 3).movedim(-1, 0),
}
FUNCTIONS = {"local_attention": neighborhood_attention, "grouped_attention": grouped_attention}
CALLS = [(FUNCTIONS[name], backend) for name, backend in PAIRS if name in FUNCTIONS]


@pytest.mark.parametrize(("attention", "backend"), CALLS)
@pytest.mark.parametrize("unpack", PACKINGS.values(), ids=PACKINGS)
def test_gradients_of_a_sum_reach_the_tensor_that_all_operands_are_views_of(unpack, attention, backend):
    """The gradient that arrives at the output is one number, expanded."""
    packed = random(2 * 3 * 2 * 8 * 14 * 14).requires_grad_()
    window = 7 if attention is neighborhood_attention else 14
    output = attention(*unpack(packed), window, backend=backend)
    expected = attention(*(part.contiguous() for part in unpack(packed)), window, backend="reference")
    assert_same([output], [expected])
    assert_same(*(torch.autograd.grad(each.sum(), packed) for each in (output, expected)))


@pytest.mark.parametrize(("attention", "backend"), CALLS)
def test_heads_without_channels_average_the_values(attention, backend):
    query, key, value = (random(1, 6, 6, 2, size) for size in (0, 0, 3))
    expected = value.mean((1, 2), keepdim=True).expand_as(value)
    assert_same([attention(query, key, value, 6, backend=backend)], [expected])
