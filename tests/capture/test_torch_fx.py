"""torch.fx both ways: converted models are traced, and traced modules are converted."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from small_models import BUILDERS, difference, images, logits, small_model
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError

EXTRACTED = {"torchvision_vit": "encoder.ln", "torchvision_swin": "features.3"}
TARGETS = [("identity", {}), ("neighborhood", {"kernel_size": 3}), ("conv_glu", {})]


def extractor(model, name):
    return create_feature_extractor(model, {EXTRACTED[name]: "features"})


def features(model, batch):
    with torch.no_grad():
        return model(batch)["features"]


@pytest.mark.parametrize("name", EXTRACTED)
@pytest.mark.parametrize(("to", "options"), TARGETS[:2])
def test_features_of_a_converted_model(name, to, options):
    donor, batch = small_model(name), images(name)
    converted = attnrewrite.convert(donor, to, batch[:1], progress=False, **options)
    seen = []
    converted.get_submodule(EXTRACTED[name]).register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        converted(batch)
    assert torch.equal(features(extractor(converted, name), batch), seen[0])


@pytest.mark.parametrize("name", EXTRACTED)
@pytest.mark.parametrize(("to", "options"), TARGETS)
def test_a_feature_extractor_is_a_donor(name, to, options):
    donor, batch = extractor(small_model(name), name).eval(), images(name)
    before, code, kind = features(donor, batch), donor.code, type(donor)
    converted = attnrewrite.convert(donor, to, batch[:1], progress=False, **options)
    assert isinstance(converted, fx.GraphModule)
    assert (type(donor), donor.code) == (kind, code)
    assert torch.equal(features(donor, batch), before)
    after = features(converted, batch)
    assert (difference(after, before) < 1e-12) == (to != "neighborhood")
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), converted.train().eval()):
        assert torch.equal(features(twin, batch), after)
    converted.train()
    features(converted, batch)
    assert torch.equal(features(attnrewrite.revert(converted.eval()), batch), before)
    assert type(converted).__bases__ == kind.__bases__


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith("transformers")])
def test_a_symbolic_trace_of_a_converted_model_computes_the_same_or_says_why(name):
    converted = attnrewrite.convert(small_model(name), "identity", images(name, 1), progress=False)
    try:
        traced = fx.symbolic_trace(converted)
    except (fx.proxy.TraceError, TypeError) as cause:
        with pytest.raises(type(cause), match=re.escape(str(cause).splitlines()[0])):
            fx.symbolic_trace(small_model(name))
        return
    assert torch.equal(logits(traced(images(name))), logits(converted(images(name))))


def test_the_checks_of_a_rewritten_root_are_traced():
    donor = small_model("torchvision_vit")
    converted = attnrewrite.convert(donor, "identity", images("torchvision_vit", 1), progress=False)
    traced = fx.symbolic_trace(converted)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    larger = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with pytest.raises(ConversionError, match=r"x has shape \[1, 3, 96, 96\]"):
        traced(larger)


def test_a_traced_layer_of_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention, self.head = nn.Conv2d(3, 32, 8, 8), Attention(), nn.Linear(32, 5)

        def forward(self, x):
            return self.head(self.attention(self.stem(x).flatten(2).mT).mean(1))

    donor, batch = fx.symbolic_trace(Net().double().eval()), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    converted = attnrewrite.convert(donor, "identity", batch[:1], progress=False)
    assert {site.kind for site in attnrewrite.report(converted).converted} == {"attention", "stem"}
    assert difference(converted(batch), donor(batch)) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_exported_models_are_refused_by_name():
    model, batch = small_model("timm_vit"), images("timm_vit", 1)
    traced = torch.jit.trace(model, batch, check_trace=False)
    model_of_one = nn.Sequential(traced)
    exported = torch.export.export(model, (batch,)).module()
    for given, reason in ((traced, "TorchScript"), (model_of_one, "0 is a scripted"), (exported, "exported program")):
        for call in (attnrewrite.convert, attnrewrite.plan):
            with pytest.raises(ArgumentError, match=reason):
                call(given, "identity", batch)
        with pytest.raises(ArgumentError, match=reason):
            attnrewrite.explain(given, batch)
