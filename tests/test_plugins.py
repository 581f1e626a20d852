"""Targets and backends of other packages: one file each, found by their entry points."""

from __future__ import annotations

import inspect
import sys
from copy import copy
from importlib import invalidate_caches

import pytest
import torch
from attention_cases import full_problem, local_problem
from plugins import install, run
from torch import nn

import attnrewrite
import attnrewrite.operators.dispatch as backends
import attnrewrite.planning.registry as patterns
from attnrewrite.errors import ArgumentError, BackendError
from attnrewrite.ir.contract import BetweenLinears, BetweenProjections, Exactness, Target
from attnrewrite.operators.backend import Request

TARGET = '''
"""Softmax without the scores: every token takes the mean of all values."""

from dataclasses import dataclass

from torch import Tensor

from attnrewrite.errors import Refusal
from attnrewrite.ir.contract import BetweenProjections, Conversion, Exactness, Target, Weights
from attnrewrite.ir.core import AttentionCore
from attnrewrite.ir.sites import Global, Site


class MeanOfValues(AttentionCore):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return value.mean(1, keepdim=True).expand(*query.shape[:-1], -1)


@dataclass(frozen=True)
class Mean(Target):
    name = "mean_of_values"

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        if not isinstance(site.keys, Global):
            raise Refusal(f"keys {site.keys} are not all tokens", "convert models with global attention")
        return BetweenProjections(Exactness.PROJECTED, "uniform attention", MeanOfValues())
'''

CONVERT = """
from attnrewrite.torchvision_compat import ensure_torchvision
ensure_torchvision()
import attnrewrite, timm, torch
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5)
converted = attnrewrite.convert(model.eval(), "mean_of_values", progress=False)
rows = attnrewrite.report(converted).sites
print([row.target for row in rows if row.kind == "attention"])
tokens, attention = torch.randn(2, 17, 48), model.blocks[0].attn
value = torch.nn.functional.linear(tokens, attention.qkv.weight[96:], attention.qkv.bias[96:])
expected = attention.proj(value.mean(1, keepdim=True).expand_as(value))
print((converted.blocks[0].attn(tokens) - expected).abs().max().item() < 1e-6)
"""

BACKEND = '''
"""Neighborhood attention as dense attention with a mask, for inference."""

import torch
import torch.nn.functional as F

from attnrewrite.lowering import Backend, Request
from attnrewrite.operators.index_rule import windows


def seen(problem):
    """[tokens, tokens]: does the query see the key?"""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for rule in problem.rules:
        axis = torch.tensor([[key in window for key in range(rule.length)] for window in windows(rule)])
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask


def local_attention(problem):
    query, key, value = (part.flatten(1, -3).transpose(1, 2) for part in problem.operands[:3])
    logits = (problem.scale * query @ key.mT).masked_fill(~seen(problem), -torch.inf)
    results = (logits.softmax(-1) @ value, logits.logsumexp(-1))
    return tuple(result.transpose(1, 2).unflatten(1, problem.grid) for result in results)


def supports(request: Request) -> str | None:
    biases_and_more = request.problem.operands[3:]
    return "it takes neither bias nor additional keys" if biases_and_more != (None,) * 6 else None


MASKED = Backend("masked", {"local_attention": local_attention}, lambda request: 1e9, supports, devices=("cpu",))
'''

ATTEND = """
import torch
from attnrewrite.functional import neighborhood_attention
from attnrewrite.lowering import available_backends, use_backend
print("masked" in available_backends())
query, key, value = torch.randn(3, 2, 7, 8, 3, 4, dtype=torch.float64).unbind(0)
geometry = dict(kernel_size=(3, 5), stride=(2, 1), is_causal=(False, True), return_lse=True)
with use_backend("masked"):
    found = neighborhood_attention(query, key, value, **geometry)
expected = neighborhood_attention(query, key, value, **geometry, backend="reference")
print(max((one - other).abs().max().item() for one, other in zip(found, expected)) < 1e-12)
"""

MINIMAL = """
from attnrewrite.lowering import Backend, Deferred
BACKEND = Backend({}, lambda request: 0.0{})
"""
RUNS = '"plugin", {"local_attention": print}'


NAMED = """
from attnrewrite.ir.contract import Target, recognizer
from attnrewrite.planning.registry import register_target

@register_target
class Mine(Target):
    name = "{}"

    def convert(self, site, index, weights): ...

@recognizer(order=99)
def nothing(flow, sites):
    return []
"""
UNREGISTERED = NAMED.format("manhattan").replace("@register_target", "")
ENTRY = "entry point 'plugin' of attnrewrite.patterns: "

PROBLEM = local_problem((8, 8), (3, 3))
REQUEST = Request.of(PROBLEM)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path of this process: what is installed there is discovered afresh, and forgotten afterwards."""
    assert backends.available_backends()
    assert patterns.known_targets()
    monkeypatch.syspath_prepend(tmp_path)
    for registry, names in ((backends, ["_backends"]), (patterns, ["_targets", "_recognizers"])):
        for name in names:
            monkeypatch.setattr(registry, name, copy(getattr(registry, name)))
    _discover_again()
    yield tmp_path
    for module in ("plugin_file", "plugin_kernels"):
        sys.modules.pop(module, None)
    _discover_again()


def _discover_again():
    for registry in (backends, patterns):
        registry._discover.cache_clear()
    backends._selected.cache_clear()


def test_a_target_is_one_file(tmp_path):
    assert len(TARGET.strip().splitlines()) < 60
    install(tmp_path, "attnrewrite.patterns", "mean_target", TARGET)
    assert run(CONVERT, tmp_path).splitlines() == ["['mean_of_values', 'mean_of_values']", "True"]


def test_a_backend_is_one_file(tmp_path):
    assert len(BACKEND.strip().splitlines()) < 60
    install(tmp_path, "attnrewrite.backends", "masked_backend:MASKED", BACKEND)
    assert run(ATTEND, tmp_path).splitlines() == ["True", "True"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (MINIMAL.format(RUNS, ', requires=("no_such",)'), "it requires no_such, which is not installed"),
        (
            MINIMAL.format(RUNS, ', requires=("no.such", "nothing_either", "torch")'),
            "it requires no.such and nothing_either, which are not installed",
        ),
        (MINIMAL.format(RUNS, ', devices=("cuda", "xpu")'), "it runs on cuda and xpu, and the operands are on cpu"),
        ("import none", "plugin_file:BACKEND could not be imported (ModuleNotFoundError: No module named 'none')"),
        ("raise OSError('no driver')", "plugin_file:BACKEND could not be imported (OSError: no driver)"),
    ],
)
def test_a_backend_that_cannot_run_here_refuses_with_the_reason(folder, source, told):
    install(folder, "attnrewrite.backends", "plugin_file:BACKEND", source, name="plugin")
    assert backends.refusals(REQUEST)["plugin"] == told
    assert backends.select_backend(REQUEST).name != "plugin"
    with pytest.raises(BackendError) as raised:
        backends.select_backend(REQUEST, "plugin")
    assert str(raised.value) == f"backend 'plugin' cannot run local_attention: {told}"


def test_deferred_implementations_are_imported_by_the_first_run(folder):
    deferred = '"plugin", Deferred("plugin_kernels", "local_attention")'
    (folder / "plugin_kernels.py").write_text("import no_such_library")
    install(folder, "attnrewrite.backends", "plugin_file:BACKEND", MINIMAL.format(deferred, ""), name="plugin")
    assert backends.select_backend(REQUEST, "plugin").name == "plugin"
    soft_split = Request.of(full_problem("soft_split"))
    assert backends.refusals(soft_split)["plugin"] == "it does not implement soft_split"
    with pytest.raises(BackendError, match=r"plugin_kernels could not be imported .*; choose another backend with"):
        backends.run(PROBLEM, "plugin")
    (folder / "plugin_kernels.py").write_text("def local_attention(problem): return problem.query, problem.key")
    invalidate_caches()
    assert backends.run(PROBLEM, "plugin") == (PROBLEM.query, PROBLEM.key)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (MINIMAL.format('"tiled", {}', ""), "a backend named 'tiled' is already registered: choose another name"),
        ("BACKEND = 'tiled'", "expected a Backend, got 'tiled'; name the object, as in 'package.module:BACKEND'"),
    ],
)
def test_a_backend_with_a_taken_name_or_of_another_kind_is_refused(folder, source, told):
    install(folder, "attnrewrite.backends", "plugin_file:BACKEND", source, name="plugin")
    for _ in range(2):  # and again when it is asked again
        with pytest.raises(BackendError) as raised:
            backends.available_backends()
        assert str(raised.value) == f"entry point 'plugin' of attnrewrite.backends: {told}"


def test_built_in_backends_are_imported_when_they_are_asked_for_and_their_names_are_taken_before(tmp_path):
    register = """
import sys
import attnrewrite.functional
from attnrewrite.errors import BackendError
from attnrewrite.lowering import Backend, register_backend
print("attnrewrite.backends" in sys.modules)
try:
    register_backend(Backend("reference", {}, lambda request: 0.0))
except BackendError as error:
    print(error)
"""
    taken = "a backend named 'reference' is already registered: choose another name"
    assert run(register, tmp_path).splitlines() == ["False", taken]


def test_a_plugin_may_bring_recognizers_and_register_its_targets_itself(folder):
    install(folder, "attnrewrite.patterns", "plugin_file", NAMED.format("plugin"))
    assert patterns.known_targets()["plugin"].__module__ == "plugin_file"
    names = [recognizer.__name__ for recognizer in patterns._recognizers]
    assert names[-1] == "nothing"
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("value", "source", "told"),
    [
        ("plugin_file", UNREGISTERED, "target: Mine takes the name 'manhattan', which Manhattan has; choose another"),
        ("plugin_file", NAMED.format("manhattan"), ENTRY + "plugin_file could not be imported (ArgumentError: target"),
        ("plugin_file", "import no_such", ENTRY + "plugin_file could not be imported (ModuleNotFoundError: No module"),
        ("plugin_file:X", "X = 1", ENTRY + "expected a module, got 1; leave out what follows the colon"),
    ],
    ids=["taken", "registers a taken one", "does not import", "not a module"],
)
def test_targets_that_cannot_be_had_are_refused_with_the_reason(folder, value, source, told):
    install(folder, "attnrewrite.patterns", value, source, name="plugin")
    for _ in range(2):
        with pytest.raises(ArgumentError) as raised:
            patterns.known_targets()
        assert str(raised.value).startswith(told)


def test_the_name_of_a_target_is_taken_once():
    class Mine(Target):
        name = "neighborhood"

    with pytest.raises(ArgumentError, match=r"takes the name 'neighborhood', which Neighborhood has; choose another"):
        patterns.register_target(Mine)
    assert patterns.known_targets()["neighborhood"] is not Mine


def test_a_target_that_gives_something_else_than_a_conversion_says_so():
    class Bare(nn.Module):
        pass

    with pytest.raises(ArgumentError, match=r"expected an attnrewrite\.ir\.core\.AttentionCore, got Bare; make it"):
        BetweenProjections(Exactness.FRESH, "", Bare())
    with pytest.raises(ArgumentError, match=r"expected an attnrewrite\.ir\.core\.StageCore, got Bare"):
        BetweenLinears(Exactness.FRESH, "", [None, Bare()])

    class Nothing(Target):
        name = "nothing"

        def convert(self, site, index, weights):
            return None

    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)).eval()
    target = Nothing()
    target.kinds = ("mlp",)
    with pytest.raises(ArgumentError, match="target nothing gave None"):
        attnrewrite.convert(model, target, torch.randn(1, 3, 16, 16), progress=False)


def test_whatever_lies_in_the_folders_is_found():
    """Nothing is listed: the registries name no target, recognizer or backend."""
    assert {"identity", "neighborhood", "t2t"} <= set(patterns.known_targets())
    assert {"reference", "tiled"} <= set(backends.available_backends())
    named = inspect.getsource(patterns) + inspect.getsource(backends)
    assert not [name for name in (*patterns.known_targets(), *backends.available_backends()) if f'"{name}"' in named]
