"""Every backend takes tensors of any layout, and touches nothing else of their storages, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from attention_cases import assert_same, grouped_axes, grouped_operands, local_axes, local_operands, random
from guarded_layouts import guarded, layouts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators import dispatch as lowering
from attnrewrite.operators import grouped_attention as grouped_op
from attnrewrite.operators import local_attention as local_op
from attnrewrite.operators.dispatch import Request, available_backends, refusals
from attnrewrite.operators.grouped_attention import grouped_attention_backward, grouped_request
from attnrewrite.operators.index_rule import Neighborhood
from attnrewrite.operators.local_attention import local_attention_backward, local_request
from attnrewrite.operators.partition_rule import Windows

# Rounding: of sums, and in bfloat16 of what the backward is given of the forward, where 2 ** -9 of a product of values
# of size 3 over 17 channels is a tenth; a wrong stride is of the size of the values.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.1}
LONGEST = {1: 40, 2: 14, 3: 6}
SCALE = 0.5


@st.composite
def sizes(draw):
    """Any size may be 0 or 1; values are mostly as wide as queries, as fused kernels ask."""
    dim = draw(st.sampled_from([1, 2, 4, 4, 8, 8, 17, 17, 0]))
    return {
        "batch": draw(st.sampled_from([1, 2] * 4 + [0])),
        "heads": draw(st.sampled_from([1, 2, 3] * 3 + [0])),
        "dim": dim,
        "value_dim": draw(st.sampled_from([dim] * 5 + [3, 8, 0])),
        "bias": draw(st.booleans()),
    }


@st.composite
def local_calls(draw):
    """Operands and geometry; additional keys may be given and yet be none."""
    rank = draw(st.integers(1, 3))
    grid, *geometry = zip(*(draw(local_axes(LONGEST[rank])) for _ in range(rank)), strict=True)
    *others, keys, values = local_operands(grid, geometry[0], additional=draw(st.integers(0, 2)), **draw(sizes()))
    if keys is not None and draw(st.sampled_from([False] * 4 + [True])):
        keys, values = keys[:, :0], values[:, :0]
    return [*others, keys, values], tuple(geometry)


@st.composite
def grouped_calls(draw):
    """Operands and geometry; the map may have no tokens."""
    rank = draw(st.integers(1, 3))
    grid, *geometry = zip(*(draw(grouped_axes(LONGEST[rank], shortest=0)) for _ in range(rank)), strict=True)
    return grouped_operands(grid, geometry[0], padded=draw(st.booleans()), **draw(sizes())), tuple(geometry)


@dataclass(frozen=True)
class Operator:
    """An operator in both directions, its random calls, and how they are described to backends."""

    calls: st.SearchStrategy
    forward: Callable
    backward: Callable
    describe: Callable[..., Request]
    geometry: type[Neighborhood | Windows]


OPERATORS = {
    "local_attention": Operator(local_calls(), local_op, local_attention_backward, local_request, Neighborhood),
    "grouped_attention": Operator(grouped_calls(), grouped_op, grouped_attention_backward, grouped_request, Windows),
}
THREE = Neighborhood((3,), (1,), (1,), (False,))
PLAIN = local_request("local_attention", *[torch.empty(1, 9, 2, 4)] * 2, None, None, THREE)
BACKENDS = [name for name in available_backends() if refusals(PLAIN)[name] is None]


def test_every_operator_of_every_backend_is_tried():
    implemented = {name for backend in available_backends() for name in lowering._named(backend).implementations}
    assert implemented == {name + direction for name in OPERATORS for direction in ("", "_backward")}
    assert {"reference", "tiled"} <= set(BACKENDS)


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


@pytest.mark.parametrize("examples", [120, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_any_layout_is_the_reference_of_contiguous_tensors(name, backend, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def compared(data):
        compare_layouts(OPERATORS[name], name, backend, data)

    compared()


def compare_layouts(operator, name, backend, data):
    storages = Storages(data)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    operands, geometry = data.draw(operator.calls)
    query, _, value, bias, extra, _ = operands
    request = operator.describe(name, query, value, bias, extra, operator.geometry(*geometry), needs_gradient=True)
    assume(refusals(request)[backend] is None)
    dtype = data.draw(st.sampled_from(list(TOLERANCES)))

    def compare(actual, expected):
        assert [(x.dtype, x.is_contiguous()) for x in actual] == [(x.dtype, True) for x in expected]
        assert_same([x.double() for x in actual], [x.double() for x in expected], TOLERANCES[dtype])
        assert storages.are_untouched()

    plain, laid_out = storages.lay_out(None if x is None else x.to(dtype) for x in operands)
    output, lse = operator.forward(*plain, *geometry, SCALE, "reference")
    compare(operator.forward(*laid_out, *geometry, SCALE, backend), (output, lse))

    # Fused kernels serve gradients that arrive at the output alone.
    reaches_lse = data.draw(st.booleans())
    gradients = random(*output.shape).to(output), random(*lse.shape).to(lse) * reaches_lse
    plain_gradients, gradients = storages.lay_out(gradients)
    plain_results, results = storages.lay_out((output, lse), may_expand=False)
    expected = operator.backward(*plain_gradients, *plain, *plain_results, *geometry, SCALE, "reference")
    compare(operator.backward(*gradients, *laid_out, *results, *geometry, SCALE, backend), expected)


PACKINGS = {
    "channels first": lambda packed: packed.view(2, 3, 2, 8, 14, 14).permute(1, 0, 4, 5, 2, 3),
    "behind the channels": lambda packed: packed.view(2, 14, 14, 2, 8, 3).movedim(-1, 0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("attention", "window"), [(neighborhood_attention, 7), (grouped_attention, 14)])
@pytest.mark.parametrize("unpack", PACKINGS.values(), ids=PACKINGS)
def test_gradients_of_a_sum_reach_the_tensor_that_all_operands_are_views_of(unpack, attention, window, backend):
    """The gradient that arrives at the output is one number, expanded."""
    packed = random(2 * 3 * 2 * 8 * 14 * 14).requires_grad_()
    output = attention(*unpack(packed), window, backend=backend)
    expected = attention(*(part.contiguous() for part in unpack(packed)), window, backend="reference")
    assert_same([output], [expected])
    assert_same(*(torch.autograd.grad(each.sum(), packed) for each in (output, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", [neighborhood_attention, grouped_attention])
def test_heads_without_channels_average_the_values(attention, backend):
    query, key, value = (random(1, 6, 6, 2, size) for size in (0, 0, 3))
    expected = value.mean((1, 2), keepdim=True).expand_as(value)
    assert_same([attention(query, key, value, 6, backend=backend)], [expected])
