"""Low-rank adapters and parametrizations, added before and after a conversion."""

from __future__ import annotations

import pytest
import torch
from model_queries import projections_of, run
from pairs import converted_from
from small_models import assert_same_gradients, difference, gradients, images, small_model
from torch import nn

import attnrewrite


class LowRank(nn.Module):
    """A linear map with a trainable low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    torch.manual_seed(5)
    for name, module in list(model.named_modules()):
        if any(module is projection for projection in projections_of(model)):
            model.set_submodule(name, LowRank(module))
    assert any(isinstance(module, LowRank) for module in model.modules())
    return model


ADAPTED = ["timm_vit", "timm_vit_unfused", "timm_swin", "transformers_vit", "transformers_swin"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_before_conversion(name):
    donor = adapt(small_model(name))
    converted = converted_from(donor, name, "identity")
    assert any("attn" in n or "attention" in n for n in (s.name for s in attnrewrite.report(converted).converted))
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_after_conversion(pairs, name):
    donor, converted = pairs(name).copies()
    before = run(donor, images(name))
    adapt(donor), adapt(converted)
    assert difference(run(donor, images(name)), before) > 1e-4
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ["timm_vit", pytest.param("timm_swin", marks=pytest.mark.slow)])
def test_weight_norm_before_conversion(name):
    donor = small_model(name)
    for projection in projections_of(donor):
        nn.utils.parametrizations.weight_norm(projection)
    converted = converted_from(donor, name, "identity")
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


class Adapted(nn.Module):
    """A layer with adapters beside it: scaled, with dropout, several, or one of them divided."""

    def __init__(self, base, dropout=0.0, count=1):
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"bias": False, "dtype": base.weight.dtype}
        self.down = nn.ModuleList(nn.Linear(base.in_features, 2, **options) for _ in range(count))
        self.up = nn.ModuleList(nn.Linear(2, base.out_features, **options) for _ in range(count))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        result = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            result = result + up(down(self.dropout(x))) * 0.7 / 2
        return result


class Factorized(nn.Sequential):
    """A layer of low rank, with a bias at both of its maps."""

    def __init__(self, base):
        options = {"dtype": base.weight.dtype}
        super().__init__(nn.Linear(base.in_features, 6, **options), nn.Linear(6, base.out_features, **options))


KINDS = {
    "scaled": Adapted,
    "dropping": lambda base: Adapted(base, dropout=0.5),
    "several": lambda base: Adapted(base, count=3),
    "factorized": Factorized,
}


def replaced(name, kind):
    donor = small_model(name)
    torch.manual_seed(3)
    wanted = ("qkv", "fc1", "proj", "query", "key", "value", "q_proj", "k_proj", "v_proj")
    for path, module in list(donor.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in wanted:
            donor.set_submodule(path, KINDS[kind](module))
    return donor.eval()


@pytest.mark.parametrize("name", ["timm_swin", "timm_vit", "transformers_swin"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_several_linear_maps_are_one(name, kind):
    donor = replaced(name, kind)
    converted = converted_from(donor, name, "identity")
    report = attnrewrite.report(converted)
    assert not [site for site in report.sites if site.kind in ("attention", "mlp") and site.status != "converted"]
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    if kind != "dropping":
        assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))
    else:
        converted.train()
        assert difference(run(converted, images(name)), run(converted, images(name))) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_adapted_layers_become_neighborhoods(kind):
    converted = converted_from(replaced("timm_swin", kind), "timm_swin", "neighborhood")
    assert all(site.status == "converted" for site in attnrewrite.report(converted).sites if site.kind == "attention")


def test_a_nonlinear_adapter_is_no_linear_map():
    class Gated(Adapted):
        def forward(self, x):
            return self.base(x) + self.up[0](self.down[0](x).tanh())

    donor = small_model("timm_swin")
    for path, module in list(donor.named_modules()):
        if path.endswith("qkv"):
            donor.set_submodule(path, Gated(module))
    assert attnrewrite.plan(donor, "conv_glu", images("timm_swin", 1)).refused


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_rounded_adapter_is_no_linear_map_either(mode):
    class Rounded(Adapted):
        def forward(self, x):
            return self.base(x) + torch.div(self.up[0](self.down[0](x)), 0.1, rounding_mode=mode)

    donor = small_model("timm_vit")
    for path, module in list(donor.named_modules()):
        if path.endswith("qkv"):
            donor.set_submodule(path, Rounded(module))
    donor.eval()
    converted = converted_from(donor, "timm_vit", "identity")
    assert difference(run(converted, images("timm_vit")), run(donor, images("timm_vit"))) < 1e-9
