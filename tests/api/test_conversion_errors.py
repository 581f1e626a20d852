"""What is said of models, kernels and weights that cannot be converted."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.patterns.targets.identity import Identity
from model_queries import fates, rewritten_names, run
from small_models import timm_vit
from torch import nn
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite import AttnRewriteError
from attnrewrite.errors import ArgumentError, CaptureError, ConversionError


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", None, 3, nn.Linear])
def test_not_a_module(model):
    with pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module, got (str|NoneType|int|type)"):
        attnrewrite.convert(model, "identity")


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("to", ["neighborhood", "identity"])
def test_a_model_without_attention(to):
    with pytest.raises(ConversionError, match=r"no (softmax )?attention.* in Sequential"):
        attnrewrite.convert(small_cnn(), to, torch.randn(1, 3, 32, 32))


def test_a_model_without_attention_but_with_a_strided_stem():
    stem = nn.Conv2d(3, 8, 4, stride=4)
    model = nn.Sequential(stem, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(ConversionError, match=r"no attention was found in Sequential"):
        attnrewrite.convert(model, "neighborhood", torch.randn(1, 3, 32, 32))


def test_a_model_or_an_image_without_values():
    with torch.device("meta"):
        model, image = small_cnn(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ArgumentError, match=r"model: Sequential is on the meta device.* by; build it on a real device"):
        attnrewrite.convert(model, "neighborhood", image)
    with pytest.raises(ArgumentError, match=r"example_inputs: on the meta device.*pass a real tensor"):
        attnrewrite.convert(small_cnn(), "neighborhood", image)


def test_a_kernel_that_does_not_fit(vit, batch):
    reason = r"kernel 9 .*does not fit the 4x4\+1 map; use kernel_size=\(4, 4\) or oversize='clamp'"
    with pytest.raises(ConversionError, match=rf"(?s)blocks\.0\.attn.*{reason}"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=9, oversize="error")


def test_a_clamped_kernel_is_reported(vit, batch):
    report = attnrewrite.report(attnrewrite.convert(vit, "neighborhood", batch, kernel_size=9))
    assert all("clamped from 9" in site.why for site in report.converted)


def test_a_dilation_that_does_not_fit(vit, batch):
    reason = r"kernel 3 with dilation 2 does not fit .*oversize='clamp'"
    with pytest.raises(ConversionError, match=rf"(?s)blocks\.0\.attn.*{reason}"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, dilation=2, oversize="error")


@pytest.mark.parametrize(
    ("where", "poison"),
    [
        ("blocks.1.attn.qkv.weight", float("nan")),
        ("blocks.1.attn.proj.bias", float("inf")),
        ("blocks.1.mlp.fc1.weight", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_never_certified(model, batch, where, poison):
    model.get_parameter(where).data.view(-1)[0] = poison
    plan = attnrewrite.plan(model, "identity", batch)
    site = where.rpartition(".")[0].rpartition(".")[0]
    refused = {planned.site.name for planned in plan.sites if planned.status == "refused"}
    assert site in refused
    assert "blocks.1.mlp" in refused  # what it is given is not finite
    assert not any(planned.certificate.passed for planned in plan.sites if planned.site.name in refused)
    assert fates(plan)["blocks.0.attn"] == "convert"


def test_weights_that_are_not_finite_leave_the_model_untouched(model, batch):
    model.blocks[0].attn.qkv.weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttnRewriteError, match=r"(?i)nan|not certified|differs"):
        attnrewrite.convert(model, "identity", batch, inplace=True)
    assert rewritten_names(model) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


class Branching(nn.Module):
    """Does something else for bright images, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.body = timm_vit()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_a_model_that_cannot_be_exported():
    model = Branching().eval()
    example = torch.randn(1, 3, 64, 64)
    with pytest.raises(Exception) as original:  # noqa: PT011 - whatever torch raises
        torch.export.export(model, (example,), strict=False)
    first = next(line.strip() for line in str(original.value).splitlines() if line.strip())
    before = values_of(model)
    with pytest.raises(CaptureError) as refused:
        attnrewrite.convert(model, "identity", example, inplace=True)
    assert "Branching cannot be exported" in str(refused.value)
    assert first[:40] in str(refused.value)
    assert "data-dependent control flow" in str(refused.value)
    assert refused.value.__cause__ is not None
    assert_untouched(model, before)


def test_the_submodule_that_can_be_exported_converts_as_is_advised():
    model = Branching().eval()
    attnrewrite.convert(model.body, "identity", torch.randn(1, 3, 64, 64), inplace=True)
    assert rewritten_names(model)
    assert run(model, torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_errors_have_the_base_class_and_a_builtin_one():
    for kind, builtin in ((ArgumentError, ValueError), (CaptureError, RuntimeError), (ConversionError, RuntimeError)):
        assert issubclass(kind, AttnRewriteError)
        assert issubclass(kind, builtin)


def test_the_identity_target_covers_what_it_says(exact):
    assert {site.kind for site in attnrewrite.report(exact).converted} == set(Identity.kinds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_packed_for_quantized_kernels_are_refused_by_name():
    model = torch.ao.quantization.quantize_dynamic(timm_vit().float(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ArgumentError, match=r"the weights of blocks\.0\.attn\.qkv\S* are packed or quantized"):
        attnrewrite.convert(model, "neighborhood", torch.randn(1, 3, 64, 64), progress=False)
