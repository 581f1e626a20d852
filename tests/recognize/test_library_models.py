"""Whole models of the three libraries: every site lifted, certified and rebuilt; exact targets exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from random_weights import perturbed
from repetition import thinned
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attnrewrite
from attnrewrite.ir.sites import AttentionSite, Global, Reduced, Window

SWIN = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}
HF_SWIN = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32}
HF_VIT = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
HF_PVT = {"depths": [1, 1, 1, 1]}


def hf(name: str, attention: str = "sdpa", **settings: Any) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(attn_implementation=attention, **settings))


def vit(name: str, **settings: Any) -> nn.Module:
    return timm.create_model(name, depth=2, embed_dim=48, num_heads=4, **settings)


def swin(size: tuple[int, int], **settings: Any) -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **SWIN, **settings)


def explicit(model: nn.Module) -> nn.Module:
    """The same model with timm's own softmax instead of the fused one."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


# name: (model, image size, attentions, MLPs, stems and merges)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], tuple[int, int, int]]] = {
    "timm vit": (lambda: vit("vit_tiny_patch16_224", img_size=(64, 96)), (64, 96), (2, 2, 1)),
    "timm vit, explicit": (lambda: explicit(vit("vit_tiny_patch16_224", img_size=64)), (64, 64), (2, 2, 1)),
    "timm vit, registers": (lambda: vit("vit_small_patch14_reg4_dinov2", img_size=(56, 70)), (56, 70), (2, 2, 1)),
    "timm vit, qk norm": (lambda: vit("vit_tiny_patch16_224", img_size=64, qk_norm=True), (64, 64), (2, 2, 1)),
    "timm deit, distilled": (lambda: vit("deit_tiny_distilled_patch16_224", img_size=64), (64, 64), (2, 2, 1)),
    "timm swin": (lambda: swin((112, 112)), (112, 112), (4, 4, 2)),
    "timm swin, fused": (lambda: swin((112, 112)), (112, 112), (4, 4, 2)),
    "timm swin, padded": (lambda: swin((100, 76)), (100, 76), (4, 4, 2)),
    "timm pvt": (lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), (96, 64), (4, 4, 4)),
    "timm pvt, linear": (lambda: timm.create_model("pvt_v2_b2_li", depths=(1, 1, 1, 1)), (96, 64), (4, 4, 4)),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 48, 96), (64, 64), (2, 2, 1)),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [7, 7]),
        (112, 76),
        (4, 4, 2),
    ),
    "transformers vit": (lambda: hf("ViTModel", image_size=64, **HF_VIT), (64, 64), (2, 2, 1)),
    "transformers vit, eager": (lambda: hf("ViTModel", "eager", image_size=(64, 96), **HF_VIT), (64, 96), (2, 2, 1)),
    "transformers swin": (lambda: hf("SwinModel", image_size=112, **HF_SWIN), (112, 112), (4, 4, 2)),
    "transformers swin, padded": (lambda: hf("SwinModel", image_size=112, **HF_SWIN), (120, 104), (4, 4, 2)),
    "transformers swin, eager": (lambda: hf("SwinModel", "eager", image_size=112, **HF_SWIN), (112, 112), (4, 4, 2)),
    "transformers pvt": (lambda: hf("PvtModel", "eager", image_size=64, **HF_PVT), (64, 64), (4, 4, 4)),
    "transformers pvt v2": (lambda: hf("PvtV2Model", "eager", image_size=64, **HF_PVT), (64, 96), (4, 4, 4)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, size, _ = MODELS[name]
    torch.manual_seed(0)
    model = perturbed(make(), 0.05)
    if name.endswith("fused"):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
    return model, torch.randn(1, 3, *size)


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, Tensor)]


def worst_error(converted: nn.Module, model: nn.Module, image: Tensor) -> float:
    pairs = zip(outputs(converted, image), outputs(model, image), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", thinned(MODELS, 2))
def test_identity_rebuilds_every_site_exactly(name: str) -> None:
    model, image = build(name)
    converted, report = attnrewrite.convert(model, "identity", image, fidelity="exact", return_report=True)
    counts = tuple(sum(site.kind == kind for site in report.sites) for kind in ("attention", "mlp", "stem"))
    assert counts == MODELS[name][2]
    assert all(site.status == "converted" for site in report.sites), report
    assert all(site.certificate.startswith("certified") for site in report.sites)
    other = torch.randn(3, *image.shape[1:])
    assert worst_error(converted, model, image) < 1e-5
    assert worst_error(converted, model, other) < 1e-5


@pytest.mark.parametrize(
    "name", thinned([name for name in MODELS if "transformers" not in name or name.endswith("padded")], 3)
)
def test_identity_is_exact_in_double_precision(name: str) -> None:
    model, image = build(name)
    model, image = model.double(), image.double()
    converted = attnrewrite.convert(model, "identity", image, fidelity="exact")
    assert worst_error(converted, model, image) < 1e-12


@pytest.mark.parametrize("name", thinned([name for name in MODELS if "swin" in name], 3))
def test_every_swin_window_becomes_neighborhood_attention_exactly(name: str) -> None:
    model, image = build(name)
    converted, report = attnrewrite.convert(model, "neighborhood", image, fidelity="exact", return_report=True)
    attention = [site for site in report.sites if site.kind == "attention"]
    assert [site.exactness for site in attention] == ["EXACT"] * 4, report
    assert worst_error(converted, model, image) < 2e-5


@pytest.mark.parametrize("name", [name for name in MODELS if "vit" in name])
def test_a_vit_with_a_kernel_as_large_as_its_map_is_exact(name: str) -> None:
    model, image = build(name)
    plan = attnrewrite.plan(model, "neighborhood", image, kernel_size=7, fidelity="exact")
    assert [site.status for site in plan.sites if site.site.kind == "attention"] == ["convert"] * 2, plan
    assert worst_error(plan.apply(), model, image) < 2e-5


@pytest.mark.parametrize("name", ["timm vit", "timm vit, registers", "transformers vit, eager"])
def test_grids_and_prefix_tokens_are_found_on_maps_that_are_not_square(name: str) -> None:
    model, image = build(name)
    grids = {
        planned.site.grid
        for planned in attnrewrite.plan(model, "identity", image).sites
        if planned.site.kind == "attention"
    }
    patch = 14 if "registers" in name else 16
    prefix = 5 if "registers" in name else 1
    assert {(grid.height, grid.width, grid.prefix_tokens) for grid in grids} == {
        (image.shape[2] // patch, image.shape[3] // patch, prefix)
    }


def test_keys_are_classified() -> None:
    kinds = {}
    for name in ("timm vit", "timm swin", "timm pvt"):
        model, image = build(name)
        sites = [planned.site for planned in attnrewrite.plan(model, "identity", image).sites]
        kinds[name] = [type(site.keys) for site in sites if isinstance(site, AttentionSite)]
    assert kinds["timm vit"] == [Global, Global]
    assert kinds["timm swin"] == [Window] * 4
    assert kinds["timm pvt"] == [Reduced, Reduced, Reduced, Global]


@pytest.mark.parametrize("kernel", [3, (5, 3)])
def test_a_small_kernel_equals_masked_attention(kernel: int | tuple[int, int]) -> None:
    """Converted attention against the original with every key outside the neighborhood masked, prefix tokens kept."""
    model, image = build("timm vit, registers")
    converted, report = attnrewrite.convert(model, "neighborhood", image, kernel_size=kernel, return_report=True)
    attention = [site for site in report.sites if site.kind == "attention"]
    assert all(site.exactness == "PROJECTED" and site.error is not None for site in attention)
    block, donor = converted.blocks[0].attn, model.blocks[0].attn
    x = torch.randn(2, 25, 48)
    with torch.no_grad():
        torch.testing.assert_close(block(x), masked_attention(donor, x, (4, 5), kernel), rtol=1e-4, atol=1e-5)


def masked_attention(donor: nn.Module, x: Tensor, grid: tuple[int, int], kernel: int | tuple[int, int]) -> Tensor:
    """The donor's attention with a mask made cell by cell, for five prefix tokens."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    seen = torch.ones(25, 25, dtype=torch.bool)
    for query in range(20):
        rows, columns = (
            range(start := min(max(place - k // 2, 0), side - k), start + k)
            for place, k, side in zip(
                (query // 5, query % 5), [min(k, s) for k, s in zip(size, grid, strict=True)], grid, strict=True
            )
        )
        for key in range(20):
            seen[query + 5, key + 5] = key // 5 in rows and key % 5 in columns
    q, k, v = donor.qkv(x).view(2, 25, 3, 4, 12).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) * 12**-0.5).masked_fill(~seen, float("-inf"))
    return donor.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


def test_dropped_mass_is_what_the_lost_keys_held() -> None:
    model, image = build("timm vit")
    report = attnrewrite.plan(model, "neighborhood", image, kernel_size=3).report()
    site = next(site for site in report.sites if site.kind == "attention")
    assert site.dropped_mass is not None
    assert len(site.dropped_mass) == 4
    assert all(0.0 < mass < 1.0 for mass in site.dropped_mass)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "vit_base_patch16_224"]
)
def test_full_size_models_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model, image = perturbed(timm.create_model(name), 0.05), torch.randn(1, 3, 224, 224)
    options = {"kernel_size": 14} if name.startswith("vit") else {}
    converted = attnrewrite.convert(model, "neighborhood", image, fidelity="exact", strict=True, **options)
    assert worst_error(converted, model, image) < 2e-5
