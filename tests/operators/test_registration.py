"""The operators as citizens of torch: opcheck, autocast, inference mode, and what the counter of FLOPs counts."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    OPERATORS,
    assert_same,
    bare_problem,
    full_problem,
    grouped_problem,
    local_problem,
    of_dtype,
    on,
)
from operator_calls import CALLS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.functional import neighborhood_attention
from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import available_backends, refusals

each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand_as(x),
}
ATTENTION = {
    "local": local_problem((5, 4), (3, 2), batch=2, value_dim=4, bias=True, additional=2, is_causal=(False, True)),
    "grouped": grouped_problem((5, 4), (3, 2), value_dim=4, bias=True, padded=True, shift=(1, 0)),
}


@pytest.mark.parametrize(("make", "layout"), [(full_problem, "transposed"), (bare_problem, "expanded")])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, make, layout):
    _opcheck(make(name), LAYOUTS[layout], "")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("problem", ATTENTION.values(), ids=ATTENTION)
def test_opcheck_of_tiles(problem, layout):
    _opcheck(problem, layout, "tiled")


def _opcheck(problem, layout, backend):
    operator = OPERATORS[problem.name]
    laid_out = [None if x is None else layout(x.detach()) for x in problem.operands]
    found = operator.forward(*laid_out, *problem.geometry, backend)
    found = found if isinstance(found, tuple) else (found,)
    assert all(result.is_contiguous() for result in found)
    gradients = [layout(torch.randn_like(result)) for result in found]
    wanted = [True] * len(laid_out)
    torch.library.opcheck(operator.backward, (*gradients, wanted, *laid_out, *found, *problem.geometry, backend))
    alone = [gradients[0], *(None for _ in gradients[1:])]
    wanted = [True] + [False] * (len(laid_out) - 1)
    torch.library.opcheck(operator.backward, (*alone, wanted, *laid_out, *found, *problem.geometry, backend))
    leaves = [None if x is None else x.requires_grad_() for x in laid_out]
    torch.library.opcheck(operator.forward, (*leaves, *problem.geometry, backend))


@pytest.mark.parametrize("make", [full_problem, bare_problem])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_problem_is_its_operands_and_its_geometry(name, make):
    problem = make(name)
    again = type(problem).of(problem.operands, [list(x) if isinstance(x, tuple) else x for x in problem.geometry])
    assert again.geometry == problem.geometry
    assert all(one is other for one, other in zip(again.operands, problem.operands, strict=True))
    shapes = [tuple(result.shape) for result in on(None)(problem)]
    assert [tuple(result.shape) for result in problem.empty_results()] == shapes


CAST = [name for name in CALLS if name != "normalized soft_split"]  # a norm of patches keeps float32


@pytest.mark.parametrize("name", CAST)
def test_autocast_casts_operands_but_not_statistics(name):
    call = CALLS[name]
    x, parameter = (each.float() for each in call.arguments())
    x.requires_grad_()
    kept = parameter if name in ("biased", "axial") else parameter.bfloat16()  # a decay is multiplied by distances
    with torch.autocast("cpu", torch.bfloat16):
        output, *statistics = call(x, parameter)
    assert output.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in statistics)
    expected = call(x.detach().bfloat16(), kept)
    assert all(torch.equal(one, other) for one, other in zip((output, *statistics), expected, strict=True))
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x.detach().double(), parameter.double())[0].dtype == torch.float64


def test_autocast_leaves_the_norm_of_patches_alone():
    call = CALLS["normalized soft_split"]
    x, parameter = (each.float() for each in call.arguments())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(call(x, parameter), call(x, parameter), 0)
        assert call(x, parameter)[0].dtype == torch.float32
        assert call(x.bfloat16(), parameter)[0].dtype == torch.float32


@each_call
def test_inference_mode_leaves_nothing_behind(call):
    x, parameter = call.arguments(taller=3, wider=3)
    with torch.inference_mode():
        expected = call(x, parameter)
    actual = call(x.requires_grad_(), parameter)
    assert_same(actual, expected)
    torch.autograd.grad(actual[0].sum(), x)


# Multiply-accumulates of the forward and of the backward, written out: (query, key) pairs times channels of queries
# (3) and of values; the backward makes the scores again.
def _attention(pairs, value_dim=4):
    return pairs * (3 + value_dim), pairs * (3 * 3 + 2 * value_dim)


LOCAL, GROUPED = {"batch": 2}, {"batch": 2, "value_dim": 5}
COUNTS = {
    "neighborhood": (local_problem((8, 7), (3, 2), **LOCAL), _attention(2 * 2 * 8 * 7 * 6, 2)),
    "with additional keys": (
        local_problem((8, 7), (3, 2), additional=2, **LOCAL), _attention(2 * 2 * 8 * 7 * (6 + 2), 2),
    ),
    "causal": (
        local_problem((8, 7), (3, 2), is_causal=(True, False), **LOCAL),
        _attention(2 * 2 * (1 + 2 + 3 * 6) * 7 * 2, 2),
    ),
    "masked": (
        local_problem((8, 7), (3, 5), boundary="mask", **LOCAL),
        _attention(2 * 2 * (2 + 3 * 6 + 2) * (3 + 4 + 5 * 3 + 4 + 3), 2),
    ),
    "masked and dilated": (
        local_problem((5,), (3,), dilation=(2,), boundary="mask", **LOCAL), _attention(2 * 2 * (2 + 2 + 3 + 2 + 2), 2),
    ),
    "masked blocks with an offset": (
        local_problem((7,), (3,), stride=(3,), offset=(1,), boundary="mask", **LOCAL),
        _attention(2 * 2 * (1 + 9 + 9), 2),
    ),
    "windows": (grouped_problem((8, 7), (4, 4), **GROUPED), _attention(2 * 2 * (16 + 16) * (16 + 9), 5)),
    "padded windows": (
        grouped_problem((8, 7), (4, 4), padded=True, **GROUPED), _attention(2 * 2 * (16 + 16) * (16 + 12), 5),
    ),
    "shifted windows": (
        grouped_problem((8, 7), (4, 4), shift=(1, 1), **GROUPED), _attention(2 * 2 * (1 + 16 + 9) * (1 + 16 + 4), 5),
    ),
    "groups of an interval": (  # six tokens of a region in two groups of three, and the last alone
        grouped_problem((7,), (3,), interval=(2,), **GROUPED), _attention(2 * 2 * (9 + 9 + 1), 5),
    ),
    "rolled windows": (  # tokens 1 2 3, 4 5 6, and 0 alone, with two padded slots of which the roll cuts one off
        grouped_problem((7,), (3,), shift=(1,), rolled=True, padded=True, **GROUPED),
        _attention(2 * 2 * (9 + 9 + 2), 5),
    ),
    "biased": (full_problem("biased_attention"), _attention(2 * 2 * 31 * 31)),
    "along columns": (full_problem("axial_attention"), _attention(2 * 2 * 30 * 5)),
    "conv_glu": (full_problem("conv_glu"), (2 * 30 * 3 * 9, 3 * 2 * 30 * 3 * 9)),
    "soft_split": (full_problem("soft_split"), (2 * 9 * 27 * 4, 2 * 2 * 9 * 27 * 4)),
}


@pytest.mark.parametrize(("problem", "macs"), COUNTS.values(), ids=COUNTS)
def test_flops(problem, macs):
    """Also of shapes without numbers, which is what costs are made of."""
    assert (problem.specs().macs(), problem.specs().backward_macs()) == macs
    backend = min(name for name, why in refusals(Request.of(problem, needs_gradient=True)).items() if not why)
    leaves = [None if x is None else x.detach().requires_grad_() for x in problem.operands]
    operator = OPERATORS[problem.name]
    with FlopCounterMode(display=False) as forward:
        found = operator.forward(*leaves, *problem.geometry, backend)
    assert forward.get_total_flops() == 2 * macs[0]
    output = found[0] if isinstance(found, tuple) else found
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * macs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_half_precision_and_its_statistics_are_not(name, dtype):
    problem = of_dtype(full_problem(name), dtype)
    for backend in available_backends():
        if refusals(Request.of(problem))[backend] is None:
            found = on(backend)(problem)
            assert [each.dtype for each in found] == [dtype, torch.float32][: len(found)]


class Seen(TorchDispatchMode):
    """Names of the operators that are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_whoever_looks_sees_the_operator(wants_gradient):
    x = torch.randn(1, 6, 6, 2, 4, dtype=torch.float64, requires_grad=wants_gradient)
    expected = neighborhood_attention(x, x, x, 3)
    with Seen() as seen:
        torch.testing.assert_close(neighborhood_attention(x, x, x, 3), expected)
    assert "attnrewrite::local_attention" in seen.names
    assert neighborhood_attention(x.detach().to("meta"), *[x.detach().to("meta")] * 2, 3).is_meta
