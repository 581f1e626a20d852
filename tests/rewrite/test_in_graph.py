"""What ``torch.compile`` hands to a backend is read, proved and edited by the same rooms as an export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import difference, images, logits, small_model
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import attnrewrite
from attnrewrite.capture.from_dynamo import captured_by_dynamo
from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import wanted_nodes
from attnrewrite.errors import CaptureError
from attnrewrite.graph.dataflow import Dataflow
from attnrewrite.ir.sites import AttentionSite
from attnrewrite.planning.registry import recognize_all, target_of
from attnrewrite.planning.stages import lifted
from attnrewrite.rewrite.in_graph import replaced_in_graph

MODELS = [
    "timm_vit", "timm_swin", "torchvision_swin",
    *(pytest.param(f"{name}_vit", marks=pytest.mark.slow) for name in ("transformers", "torchvision")),
    pytest.param("timm_vit_unfused", marks=pytest.mark.slow),
]  # fmt: skip


class Backend:
    """Of ``torch.compile``: recognizes and proves what it is given, and runs it with the attention sites replaced by
    ``to``; ``module`` is what runs."""

    def __init__(self, to="identity", **options):
        self.target = target_of(to, options)

    def __call__(self, compiled, example_inputs):
        self.captured = captured_by_dynamo(compiled, example_inputs)
        flow = Dataflow(self.captured)
        self.sites = [site for site in recognize_all(flow) if isinstance(site, AttentionSite)]
        values = collect_values(flow, wanted_nodes(self.sites))
        self.certificates = [certify(site, flow, values) for site in self.sites]
        conversions = {id(s): self.target.convert(s, i, flow.weights) for i, s in enumerate(self.sites)}
        for site in self.sites:
            for core in conversions[id(site)].modules:
                core.to(site.source.meta["val"].dtype)
        before = list(self.captured.graph.nodes)
        self.module = replaced_in_graph(flow, self.sites, conversions)
        assert list(self.captured.graph.nodes) == before
        return self.module


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def run(model, batch):
    with torch.no_grad():
        return logits(model(batch))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_sites_are_found_proved_and_replaced(name):
    model, batch, backend = small_model(name), images(name), Backend()
    actual = run(torch.compile(model, backend=backend, dynamic=False), batch)
    exported = [each.site for each in lifted(model, batch).sites if isinstance(each.site, AttentionSite)]
    assert exported
    assert [(s.name, s.describe()) for s in backend.sites] == [(s.name, s.describe()) for s in exported]
    assert all(certificate.passed for certificate in backend.certificates), backend.certificates
    cores = [type(child).__module__ for child in backend.module.children()]
    assert len(cores) == len(exported)
    assert all(core.startswith("attnrewrite.cores.") for core in cores)
    assert difference(actual, run(model, batch)) < 1e-12


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin"])
def test_learned_values_have_the_names_of_the_model_s(name):
    model, backend = small_model(name), Backend()
    run(torch.compile(model, backend=backend, dynamic=False), images(name))
    captured = backend.captured
    parameters = dict(model.named_parameters())
    found = {captured.names[node]: captured.tensors[node] for node in captured.learned}
    assert found.keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in found.items())
    buffers = dict(model.named_buffers())
    held = {captured.names[node]: captured.tensors[node] for node in captured.names.keys() - captured.learned}
    assert bool(held) == (name == "timm_swin")
    assert all(torch.equal(value, buffers[name]) for name, value in held.items())
    assert [captured.tensors[node].shape for node in captured.inputs] == [images(name).shape]


def test_another_operator_in_the_graph_is_the_one_of_a_conversion():
    """The graph edited, and the modules rewritten, compute the same other function."""
    model, batch = small_model("timm_vit"), images("timm_vit")
    actual = run(torch.compile(model, backend=Backend("neighborhood", kernel_size=3), dynamic=False), batch)
    converted = attnrewrite.convert(model, "neighborhood", batch, kernel_size=3, progress=False)
    assert difference(actual, run(converted, batch)) < 1e-12
    assert difference(actual, run(model, batch)) > 1e-3


def test_a_planted_fault_is_seen_in_this_graph_too():
    model, batch, backend = small_model("timm_vit"), images("timm_vit"), Backend()
    run(torch.compile(model, backend=backend, dynamic=False), batch)
    flow = Dataflow(backend.captured)
    (site, *_) = (each for each in recognize_all(flow) if isinstance(each, AttentionSite))
    values = collect_values(flow, wanted_nodes([site]))
    wrong = replace(site, query=replace(site.query, rows=site.query.rows.flip(1)))
    with torch.no_grad():
        assert certify(site, flow, values).passed
        assert not certify(wrong, flow, values).passed


def test_symbolic_sizes_are_refused():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.flatten(1).mean(1) * x.shape[0]

    with pytest.raises(BackendCompilerFailed, match="symbolic sizes") as raised:
        torch.compile(Pooled(), backend=captured_only, dynamic=True)(torch.randn(3, 4, 5))
    assert isinstance(raised.value.inner_exception, CaptureError)


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", enabled=False), torch.no_grad])
def test_a_change_of_mode_on_the_way_is_refused(mode):
    class Changing(nn.Linear):
        def forward(self, x):
            with mode():
                y = super().forward(x)
            return y + x

    with pytest.raises(BackendCompilerFailed, match=r"the graph calls _(enter_autocast|set_grad_enabled), which is no"):
        torch.compile(Changing(4, 4), backend=captured_only)(torch.randn(2, 4))


def captured_only(compiled, example_inputs):
    captured_by_dynamo(compiled, example_inputs)
    return compiled
