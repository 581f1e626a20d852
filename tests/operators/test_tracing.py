"""Compilers, exporters and tracers take every operator: whole, or as its plain form where a custom operator is lost."""

from __future__ import annotations

import io

import pytest
import torch
from attention_cases import assert_same
from operator_calls import CALLS, Called

from attnrewrite.lowering import plain_decompositions

each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_it_compiles_to_one_graph_forward_and_backward(call):
    torch._dynamo.reset()
    compiled = torch.compile(call.__call__, fullgraph=True, dynamic=True, backend="aot_eager")
    for taller in (0, 2):
        x, parameter = (each.requires_grad_() for each in call.arguments(taller=taller))
        outcomes = [run(x, parameter) for run in (call, compiled)]
        assert_same(outcomes[1], outcomes[0])
        gradients = [torch.autograd.grad(sum(each.sin().sum() for each in out), (x, parameter)) for out in outcomes]
        assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["neighborhood", "conv_glu"])
def test_the_default_compiler_takes_it(name):
    torch._dynamo.reset()
    x, parameter = (each.requires_grad_() for each in CALLS[name].arguments())
    outcomes = [run(x, parameter) for run in (CALLS[name], torch.compile(CALLS[name].__call__, fullgraph=True))]
    assert_same(outcomes[1], outcomes[0])
    gradients = [torch.autograd.grad(sum(each.sum() for each in out), (x, parameter)) for out in outcomes]
    assert_same(gradients[1], gradients[0])


STRICT = ["neighborhood", "grouped", "biased"]


@pytest.mark.parametrize(("call", "strict"), [(c, False) for c in CALLS.values()] + [(CALLS[c], True) for c in STRICT])
def test_it_exports_whole_with_dynamic_batch_height_and_width(call, strict):
    x, parameter = call.arguments()
    model = Called(call, parameter)
    sizes = {0: torch.export.Dim("batch"), **{axis: torch.export.Dim(f"side{axis}", min=6) for axis in call.axes}}
    program = torch.export.export(model, (x,), dynamic_shapes=({"x": sizes} if strict else (sizes,)), strict=strict)
    assert sum("attnrewrite" in str(node.target) for node in program.graph.nodes) == 1
    other, _ = call.arguments(batch=3, taller=5, wider=4)
    assert_same(program.module()(other), model(other))


@each_call
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of a trace
def test_it_is_traced_in_plain_operations(call):
    x, parameter = call.arguments()
    model = Called(call, parameter).eval()
    traced = torch.jit.trace(model, x, check_trace=False)
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("attnrewrite::")]
    other = call.arguments()[0]
    assert_same(traced(other), model(other))


@each_call
def test_a_program_is_decomposed_into_plain_operations_of_any_size(call):
    x, parameter = call.arguments()
    model = Called(call, parameter)
    sizes = {0: torch.export.Dim("batch"), **{axis: torch.export.Dim(f"side{axis}", min=6) for axis in call.axes}}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    decomposed = program.run_decompositions(plain_decompositions())
    assert not [node for node in decomposed.graph.nodes if "attnrewrite" in str(node.target)]
    other, _ = call.arguments(batch=3, taller=5, wider=4)
    assert_same(decomposed.module()(other), model(other))


@pytest.mark.parametrize("exported_before", [False, True])
@each_call
def test_it_is_exported_to_onnx_in_plain_operations(call, exported_before):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x, parameter = (each.float() for each in call.arguments())
    model = Called(call, parameter).eval()
    given = torch.export.export(model, (x,)).run_decompositions(plain_decompositions()) if exported_before else model
    with torch.no_grad():
        program = torch.onnx.export(given, () if exported_before else (x,), dynamo=True, verbose=False, optimize=False)
    stored = io.BytesIO()
    program.save(stored)
    loaded = onnx.load_from_string(stored.getvalue())
    assert {node.domain for node in loaded.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    found = ReferenceEvaluator(loaded).run(None, {loaded.graph.input[0].name: x.numpy()})
    assert_same([torch.from_numpy(each) for each in found], model(x), 1e-5)
