"""The operators as citizens of torch: opcheck, tracing, export, autocast, FLOPs, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, grouped_operands, local_operands, random
from attnrewrite.backends import reference
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.errors import BackendError
from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators import grouped_attention as grouped_op
from attnrewrite.operators import local_attention as local_op
from attnrewrite.operators.grouped_attention import grouped_attention_backward
from attnrewrite.operators.local_attention import local_attention_backward

LOCAL = ((3, 2), (1, 2), (1, 2), (False, True), 0.5)
GROUPED = ((3, 2), (1, 0), 0.5)
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "additional": 2}], ids=["plain", "full"])
def test_opcheck_local(layout, options, backend):
    operands = local_operands((5, 4), (3, 2), batch=2, value_dim=4, **options)
    _opcheck(local_op, local_attention_backward, operands, layout, (*LOCAL, backend))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "padded": True}], ids=["plain", "full"])
def test_opcheck_grouped(layout, options, backend):
    operands = grouped_operands((5, 4), (3, 2), value_dim=4, **options)
    _opcheck(grouped_op, grouped_attention_backward, operands, layout, (*GROUPED, backend))


def _opcheck(forward, backward, operands, layout, geometry):
    laid_out = [None if x is None else layout(x) for x in operands]
    output, lse = forward(*laid_out, *geometry)
    assert output.is_contiguous()
    gradients = layout(torch.randn_like(output)), layout(torch.randn_like(lse))
    torch.library.opcheck(backward, (*gradients, *laid_out, output, lse, *geometry))
    leaves = [None if x is None else x.requires_grad_() for x in laid_out]
    torch.library.opcheck(forward, (*leaves, *geometry))


def neighborhood(x, bias):
    return neighborhood_attention(x, x, x, 3, dilation=(1, 2), bias=bias, return_lse=True)


def grouped(x, bias):
    pads = x[0, 0, 0], x[0, 0, 1]
    return grouped_attention(x, x, x, 3, 1, bias=bias, pad_key=pads[0], pad_value=pads[1], return_lse=True)


FUNCTIONS = [(neighborhood, (2, 5, 5)), (grouped, (2, 9, 9))]


@pytest.mark.parametrize(("function", "bias_shape"), FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph_forward_and_backward(function, bias_shape, dynamic):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for grid in ((7, 8), (6, 9)):
        x, bias = random(2, *grid, 2, 4).requires_grad_(), random(*bias_shape).requires_grad_()
        outcomes = [run(x, bias) for run in (function, compiled)]
        assert_same(outcomes[1], outcomes[0])
        gradients = [torch.autograd.grad(out.sum() + lse.sum(), (x, bias)) for out, lse in outcomes]
        assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("function", "bias_shape"), FUNCTIONS)
def test_exports_with_a_dynamic_batch(function, bias_shape, strict):
    class Model(torch.nn.Module):
        def forward(self, x, bias):
            return function(x, bias)

    bias = random(*bias_shape)
    shapes = {"x": {0: torch.export.Dim("batch")}, "bias": None}
    program = torch.export.export(
        Model(), (random(2, 7, 8, 2, 4), bias), dynamic_shapes=shapes, strict=strict
    )
    assert sum("attnrewrite" in str(node.target) for node in program.graph.nodes) == 1
    x = random(5, 7, 8, 2, 4)
    assert_same(program.module()(x, bias), function(x, bias))


@pytest.mark.parametrize(("function", "bias_shape"), FUNCTIONS)
def test_autocast_casts_operands_but_not_statistics(function, bias_shape):
    x, bias = random(2, 7, 8, 2, 4).float().requires_grad_(), random(*bias_shape).float()
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = function(x, bias)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    halves = x.detach().bfloat16(), bias.bfloat16()
    assert torch.equal(lse, function(*halves)[1])
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x.double(), bias.double())[0].dtype == torch.float64


@pytest.mark.parametrize(("function", "bias_shape"), FUNCTIONS)
def test_inference_mode_leaves_nothing_behind(function, bias_shape):
    x, bias = random(1, 10, 11, 2, 4), random(*bias_shape)
    with torch.inference_mode():
        expected = function(x, bias)
    actual = function(x.requires_grad_(), bias)
    assert_same(actual, expected)
    torch.autograd.grad(actual[0].sum(), x)


@pytest.mark.parametrize(
    ("causal", "pairs"), [((False, False), 8 * 7 * 3 * 2), ((True, False), (1 + 2 + 3 * 6) * 7 * 2)]
)
def test_flops_of_neighborhood_attention(causal, pairs):
    query, key, value, _, keys, values = local_operands((8, 7), (3, 2), batch=2, value_dim=5, additional=2)

    def function(query, key, value, keys, values):
        return neighborhood_attention(
            query, key, value, (3, 2), is_causal=causal, additional_keys=keys, additional_values=values
        )

    _assert_flops(function, [query, key, value, keys, values], 2 * 2 * (pairs + 8 * 7 * 2))


@pytest.mark.parametrize(
    ("padded", "shift", "pairs"),
    [
        (False, 0, (16 + 16) * (16 + 9)),
        (True, 0, (16 + 16) * (16 + 12)),
        (False, 1, (1 + 16 + 9) * (1 + 16 + 4)),
    ],
)
def test_flops_of_grouped_attention(padded, shift, pairs):
    operands = grouped_operands((8, 7), (4, 4), batch=2, value_dim=5, padded=padded)

    def function(query, key, value, pad_key=None, pad_value=None):
        return grouped_attention(query, key, value, 4, shift, pad_key=pad_key, pad_value=pad_value)

    _assert_flops(function, [x for x in operands if x is not None], 2 * 2 * pairs)


def _assert_flops(function, operands, pairs):
    head_dim, value_dim = operands[0].shape[-1], operands[2].shape[-1]
    leaves = [operand.requires_grad_() for operand in operands]
    with FlopCounterMode(display=False) as forward:
        output = function(*leaves)
    assert forward.get_total_flops() == 2 * pairs * (head_dim + value_dim)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * pairs * (3 * head_dim + 2 * value_dim)


@pytest.mark.parametrize(("function", "bias_shape"), FUNCTIONS)
def test_forward_mode_is_refused_rather_than_zero(function, bias_shape):
    x, bias = random(1, 6, 6, 2, 4), random(*bias_shape)
    with pytest.raises(BackendError, match="no forward-mode derivative: use reverse mode"):
        torch.func.jvp(lambda x: function(x, bias), (x,), (x,))


def test_second_derivatives_are_refused():
    x = random(1, 6, 6, 2, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(neighborhood_attention(x, x, x, 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.sum(), x)


def test_the_reference_functions_take_any_derivative():
    x, tangent = random(1, 5, 5, 2, 3), random(1, 5, 5, 2, 3)

    def function(x):
        return reference.local_attention(x, x, x, None, None, None, *LOCAL)[0]

    _, derivative = torch.func.jvp(function, (x,), (tangent,))
    difference = (function(x + 1e-5 * tangent) - function(x - 1e-5 * tangent)) / 2e-5
    assert_same([derivative], [difference], 1e-8)  # of the finite difference
    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(),))
