"""Derivatives of every operator: first ones of every backend, and all others of the plain form."""

from __future__ import annotations

import pytest
import torch
from attention_cases import OPERATORS, assert_same, bare_problem, full_problem, random
from operator_calls import CALLS

from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import refusals

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
PAIRS = [
    (name, make, backend)
    for name in OPERATORS
    for make in (full_problem, bare_problem)
    for backend, reason in refusals(Request.of(make(name), needs_gradient=True)).items()
    if reason is None
]


def function_of(problem, backend=None):
    """The results of a problem as a function of the operands that it has, and those."""
    present = [operand for operand in problem.operands if operand is not None]

    def function(*tensors):
        rest = iter(tensors)
        operands = [None if operand is None else next(rest) for operand in problem.operands]
        return OPERATORS[problem.name](problem.with_operands(operands), backend)

    return function, present


@pytest.mark.parametrize(("name", "make", "backend"), PAIRS)
def test_first_derivatives_of_every_backend(name, make, backend):
    function, operands = function_of(make(name, batch=1, sides=(5, 4)), backend)
    leaves = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("make", [full_problem, bare_problem])
@each_operator
def test_second_derivatives(name, make):
    function, operands = function_of(make(name, batch=1, sides=(5, 4)))
    leaves = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("make", [full_problem, bare_problem])
@each_operator
def test_forward_mode(name, make):
    function, operands = function_of(make(name))
    tangents = tuple(random(*operand.shape) for operand in operands)
    values, derivatives = torch.func.jvp(function, tuple(operands), tangents)
    assert_same(values, function(*operands))
    step = 1e-6
    ahead, behind = (
        function(*(x + sign * step * t for x, t in zip(operands, tangents, strict=True))) for sign in (1, -1)
    )
    differences = [(one - other) / (2 * step) for one, other in zip(ahead, behind, strict=True)]
    assert_same(derivatives, differences, 1e-7)  # of the finite difference


@each_call
def test_gradients_sample_by_sample(call):
    x, parameter = call.arguments(batch=3)

    def loss(parameter, image):
        return sum(each.sin().sum() for each in call(image[None], parameter))

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameter, x)
    leaf = parameter.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(leaf, image), leaf)[0] for image in x])
    assert_same([found], [expected])


@each_call
def test_a_map_over_parameters_is_a_loop_over_them(call):
    x, parameter = call.arguments()
    parameters = torch.stack([parameter, 0.5 * parameter])
    found = torch.func.vmap(call.__call__, in_dims=(None, 0))(x, parameters)
    expected = [torch.stack(each) for each in zip(*(call(x, one) for one in parameters), strict=True)]
    assert_same(found, expected)


@each_operator
def test_gradients_that_are_differentiated_again_are_those_of_the_backend(name):
    problem = full_problem(name)
    leaves = [operand.requires_grad_() for operand in problem.operands]
    outcome = OPERATORS[name](problem.with_operands(leaves), "reference")
    loss = sum(each.sin().sum() for each in outcome)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert_same(again, first)
    assert all(each.requires_grad for each in again)


@each_operator
def test_no_gradient_arrives_where_none_is_wanted(name):
    problem = full_problem(name)
    first = problem.operands[0].requires_grad_()
    output = OPERATORS[name](problem)[0]
    (alone,) = torch.autograd.grad(output.sum(), first)
    every = [operand.requires_grad_() for operand in problem.operands]
    expected = torch.autograd.grad(OPERATORS[name](problem)[0].sum(), every)
    assert_same([alone], expected[:1])


def test_a_result_that_depends_on_no_wanted_operand_gives_none():
    """As a log-sum-exp, which does not depend on values."""
    problem = bare_problem("local_attention")
    value = problem.value.requires_grad_()
    output, lse = OPERATORS["local_attention"](problem)
    (first,) = torch.autograd.grad((output + lse[..., None]).sum(), value, retain_graph=True)
    (again,) = torch.autograd.grad((output + lse[..., None]).sum(), value, create_graph=True)
    assert_same([again], [first])
    (alone,) = torch.autograd.grad(lse.sum(), value, create_graph=True, materialize_grads=True)
    assert not alone.any()
