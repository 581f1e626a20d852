"""The backend registry and its rules of choice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_cases import assert_same, full_problem, local_problem, of_dtype, random
from attnrewrite.backends.native import library

from attnrewrite.errors import BackendError
from attnrewrite.functional import neighborhood_attention
from attnrewrite.operators import dispatch as lowering
from attnrewrite.operators.backend import Backend, Request
from attnrewrite.operators.dispatch import available_backends, refusals, register_backend, select_backend, use_backend

PROBLEM = of_dtype(local_problem((56, 56), (7, 7), heads=4, dim=32, value_dim=32), torch.float32)
REQUEST = Request.of(PROBLEM)
FASTEST = "tiled" if library.missing() else "native"
SOFT_SPLIT = Request.of(full_problem("soft_split"))


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch):
    monkeypatch.delenv(lowering.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(lowering, "_backends", {name: lowering._named(name) for name in available_backends()})
    lowering._selected.cache_clear()
    yield
    lowering._selected.cache_clear()


def picky(
    name="picky", reason=None, implementations=("local_attention", "local_attention_backward"), cost=1e-9
):
    """A cheap backend that supports everything, or nothing for a reason."""
    return Backend(name, dict.fromkeys(implementations, _seven), lambda _: cost, lambda _: reason)


def _seven(problem):
    return tuple(torch.full_like(result, 7.0) for result in problem.empty_results())


def test_built_in_backends():
    assert {"plain", "reference", "tiled"} <= set(available_backends())
    assert (REQUEST.operator, REQUEST.device, REQUEST.dtype) == ("local_attention", "cpu", torch.float32)
    assert replace(REQUEST, backward=True).operator == "local_attention_backward"


def test_a_request_has_sizes_and_no_numbers():
    """So that a choice can be remembered: equal calls are equal requests."""
    again = of_dtype(local_problem((56, 56), (7, 7), heads=4, dim=32, value_dim=32), torch.float32)
    assert Request.of(again) == REQUEST
    assert hash(Request.of(again)) == hash(REQUEST)
    other = again.with_operands([again.query.transpose(1, 2), *again.operands[1:]])
    assert Request.of(other) != REQUEST
    assert REQUEST.problem.macs() == PROBLEM.macs()


def test_a_request_says_whether_the_same_bits_are_asked_for():
    torch.use_deterministic_algorithms(True)
    try:
        assert Request.of(PROBLEM).deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert not REQUEST.deterministic
    assert REQUEST.capability == torch.backends.cpu.get_cpu_capability()


def test_the_cheapest_that_supports_the_request_is_chosen():
    assert select_backend(REQUEST).name == FASTEST
    register_backend(picky("free"))
    register_backend(picky("unable", "it is tired", cost=0.0))
    assert select_backend(REQUEST).name == "free"
    assert refusals(REQUEST)["unable"] == "it is tired"
    assert refusals(REQUEST)["tiled"] is None


def test_argument_before_context_before_environment_before_cost(monkeypatch):
    register_backend(picky("free"))
    monkeypatch.setenv(lowering.ENVIRONMENT_VARIABLE, "tiled")
    assert select_backend(REQUEST).name == "tiled"
    with use_backend("reference"):
        assert select_backend(REQUEST).name == "reference"
        with use_backend("free"):
            assert select_backend(REQUEST).name == "free"
        assert select_backend(REQUEST, "tiled").name == "tiled"
    assert select_backend(REQUEST).name == "tiled"


def test_unknown_names_are_answered_with_the_nearest(monkeypatch):
    with pytest.raises(BackendError, match=r"unknown backend 'tilde', known are .*did you mean 'tiled'"):
        select_backend(REQUEST, "tilde")
    with (
        pytest.raises(BackendError, match=r"unknown backend 'xyz', known are .*reference, tiled$"),
        use_backend("xyz"),
    ):
        pass
    monkeypatch.setenv(lowering.ENVIRONMENT_VARIABLE, "nowhere")
    with pytest.raises(BackendError, match="unknown backend 'nowhere'"):
        select_backend(REQUEST)


def test_a_chosen_backend_that_cannot_says_why():
    register_backend(picky(reason="it is tired"))
    with pytest.raises(BackendError, match="backend 'picky' cannot run local_attention: it is tired"):
        select_backend(REQUEST, "picky")
    with pytest.raises(BackendError, match="cannot run soft_split: it does not implement soft_split"):
        select_backend(SOFT_SPLIT, "tiled")


def test_a_backend_without_backward_serves_only_inference():
    register_backend(picky("forward_only", implementations=("local_attention",)))
    assert select_backend(REQUEST).name == "forward_only"
    training = replace(REQUEST, needs_gradient=True)
    assert select_backend(training).name == FASTEST
    with pytest.raises(BackendError, match="it has no backward of local_attention"):
        select_backend(training, "forward_only")


def test_when_nobody_can_everybody_says_why(monkeypatch):
    able = {name: backend for name, backend in lowering._backends.items() if backend.refusal(SOFT_SPLIT)}
    monkeypatch.setattr(lowering, "_backends", able)
    with pytest.raises(BackendError, match=r"no backend can run soft_split \(.*tiled: it does not implement"):
        select_backend(SOFT_SPLIT)


def test_what_no_other_takes_is_run_in_plain_operations():
    assert select_backend(SOFT_SPLIT).name == "plain"
    assert select_backend(replace(SOFT_SPLIT, needs_gradient=True)).name == "plain"


def test_names_are_unique():
    with pytest.raises(
        BackendError, match="a backend named 'tiled' is already registered: choose another name"
    ):
        register_backend(picky("tiled"))


def test_plugins_are_found_by_their_entry_point(monkeypatch):
    entry = SimpleNamespace(load=lambda: picky("plugin"))
    monkeypatch.setattr(
        lowering, "entry_points", lambda group: [entry] if group == "attnrewrite.backends" else []
    )
    lowering._discover.cache_clear()
    assert "plugin" in available_backends()


def test_functions_run_where_they_are_told_forward_and_backward():
    register_backend(picky())
    x = random(1, 9, 9, 2, 4).float()
    with use_backend("picky"):
        assert neighborhood_attention(x, x, x, 3).eq(7).all()
        expected = neighborhood_attention(x, x, x, 3, backend="reference")
    assert_same([neighborhood_attention(x, x, x, 3, backend="tiled")], [expected], 1e-6)


def test_backward_stays_on_the_backend_of_the_forward():
    x = random(1, 9, 9, 2, 4).requires_grad_()
    reference, calls = lowering._named("reference"), []

    def spied(name):
        return lambda *arguments: (calls.append(name), reference.implementations[name](*arguments))[1]

    spies = {name: spied(name) for name in ("local_attention", "local_attention_backward")}
    register_backend(replace(reference, name="spy", implementations=spies))
    with use_backend("spy"):
        output = neighborhood_attention(x, x, x, 3)
    output.sum().backward()
    assert calls == ["local_attention", "local_attention_backward"]


def test_a_compiled_graph_chooses_when_it_runs():
    register_backend(picky(cost=1e9))
    compiled = torch.compile(
        lambda x: neighborhood_attention(x, x, x, 3), fullgraph=True, backend="aot_eager"
    )
    x = random(1, 9, 9, 2, 4).float()
    assert_same([compiled(x)], [neighborhood_attention(x, x, x, 3)], 1e-6)
    with use_backend("picky"):
        assert compiled(x).eq(7).all()
