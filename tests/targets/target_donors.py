"""Small donors for every kind of attention that the targets start from, with no trivial weight among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import timm
import torch
import torchvision
import transformers
from random_weights import randomized
from torch import Tensor, nn

import attnrewrite
from attnrewrite.reports.conversion import SiteReport

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
SWIN = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 5}
PVT = {"depths": (1, 1, 1, 1), "num_classes": 5, "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3)}


def timm_vit(name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    return timm.create_model(name, **(VIT | options))


def timm_swin(size: tuple[int, int]) -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=size, drop_path_rate=0.0, **SWIN)


def timm_pyramid(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, drop_path_rate=0.0, mlp_ratios=(2, 2, 2, 2), **PVT, **options)


def transformers_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=(64, 96), patch_size=16,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def transformers_swin() -> nn.Module:
    config = transformers.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], image_size=32, window_size=4, num_labels=5, drop_path_rate=0.0
    )
    return transformers.SwinForImageClassification(config)


def transformers_pvt() -> nn.Module:
    config = transformers.PvtConfig(
        image_size=64, depths=[1, 1, 1, 1], num_labels=5, hidden_sizes=[8, 12, 16, 24],
        num_attention_heads=[1, 2, 2, 3],
        mlp_ratios=[2, 2, 2, 2], attn_implementation="eager", drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.PvtForImageClassification(config)


# name: (model, image size)
DONORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "vit": (lambda: timm_vit(img_size=(64, 96)), (64, 96)),
    "vit, registers": (lambda: timm_vit("vit_small_patch14_reg4_dinov2", img_size=(56, 70)), (56, 70)),
    "vit, average": (lambda: timm_vit(img_size=(96, 80), class_token=False, global_pool="avg"), (96, 80)),
    "vit, qk norm": (lambda: timm_vit(img_size=(64, 96), qk_norm=True), (64, 96)),
    "vit, large map": (lambda: timm_vit(img_size=(144, 128)), (144, 128)),
    "swin": (lambda: timm_swin((32, 32)), (32, 32)),
    "swin, padded": (lambda: timm_swin((40, 56)), (40, 56)),
    "pvt v2": (lambda: timm_pyramid("pvt_v2_b0"), (64, 96)),
    "pvt v2, linear": (lambda: timm_pyramid("pvt_v2_b2_li"), (64, 96)),
    "pvt v1, twins": (lambda: timm_pyramid("twins_pcpvt_small", img_size=(64, 96)), (64, 96)),
    "pvt v1, transformers": (transformers_pvt, (64, 64)),
    "vit, torchvision": (lambda: torchvision.models.VisionTransformer(64, 16, 2, 3, 24, 48, num_classes=5), (64, 64)),
    "vit, transformers": (transformers_vit, (64, 96)),
    "swin, torchvision": (
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, stochastic_depth_prob=0.0
        ),
        (32, 32),
    ),
    "swin, transformers": (transformers_swin, (32, 32)),
}


@cache
def donor(name: str) -> nn.Module:
    """In float64 and eval mode; shared, so never changed by a test."""
    torch.manual_seed(0)
    return randomized(DONORS[name][0]()).double()


def images(name: str, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *DONORS[name][1], generator=generator, dtype=torch.float64).to(dtype)


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(batch)
    return getattr(output, "logits", output)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return float((actual - expected).norm() / expected.norm())


def attention_rows(model: nn.Module) -> list[SiteReport]:
    """What the report says of every attention of a converted model."""
    return [site for site in attnrewrite.report(model).sites if site.kind == "attention"]


def new_parameters(model: nn.Module, old: nn.Module) -> dict[str, nn.Parameter]:
    known = {name for name, _ in old.named_parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if name not in known}


def moved(model: nn.Module, old: nn.Module, size: float = 0.3) -> nn.Module:
    """The converted model with every new parameter away from where it started."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in new_parameters(model, old).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
