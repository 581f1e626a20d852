"""More donors, for the targets of MLPs and stems, and what tests ask of such sites."""

from __future__ import annotations

from functools import partial

import timm
import torch
from target_donors import DONORS, PVT, VIT, timm_vit
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from torch import nn

import attnrewrite
from attnrewrite.reports.conversion import SiteReport


def eva(**options: object) -> nn.Module:
    return Eva(img_size=(64, 96), patch_size=16, swiglu_mlp=True, qkv_fused=False, **(VIT | options))


def small_pvt() -> nn.Module:
    widths = {"embed_dims": (8, 16, 32, 32), "num_heads": (1, 2, 2, 2)}
    return timm.create_model("pvt_v2_b0", drop_path_rate=0.0, **(PVT | widths))


def dropping_vit() -> nn.Module:
    model = timm_vit(img_size=(64, 96), mlp_ratio=2.0)
    for block in model.blocks:
        block.mlp.drop1.p, block.mlp.drop2.p = 0.2, 0.3
    return model


DONORS |= {
    "vit, dynamic": (lambda: timm_vit(img_size=(64, 96), dynamic_img_size=True), (64, 96)),
    "vit, packed gate": (lambda: timm_vit(img_size=(64, 96), mlp_layer=SwiGLUPacked), (64, 96)),
    "vit, dropout": (dropping_vit, (64, 96)),
    "vit, swiglu": (partial(eva, scale_mlp=False), (64, 96)),
    "vit, swiglu and norm": (partial(eva, scale_mlp=True), (64, 96)),
    "vit, inner norm": (lambda: timm_vit(img_size=(64, 96), scale_mlp_norm=True), (64, 96)),
    "pvt v2, any size": (small_pvt, (64, 64)),
    "vit, patches of 14": (lambda: timm_vit("vit_tiny_patch16_224", img_size=56, patch_size=14), (56, 56)),
    "vit, patches of 32": (lambda: timm_vit("vit_tiny_patch16_224", img_size=64, patch_size=32), (64, 64)),
}


def rows_of(model: nn.Module, kind: str) -> list[SiteReport]:
    """What the report says of the sites of a kind that were converted."""
    return [site for site in attnrewrite.report(model).sites if site.kind == kind and site.status == "converted"]


def new_cores(model: nn.Module, stem: str) -> list[nn.Module]:
    """The modules that were added under a name beginning with ``attnrewrite_<stem>``, in order."""
    added = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return [module for name, module in added if name.startswith(f"attnrewrite_{stem}")]


def plan_of(name: str, to: object, **options: object) -> object:
    model = DONORS[name][0]().eval()
    return attnrewrite.plan(model, to, torch.randn(1, 3, *DONORS[name][1]), **options)


__all__ = ["DONORS", "new_cores", "plan_of", "rows_of"]
