"""What tests ask about a model and about what was converted in it."""

from __future__ import annotations

import torch
from small_models import logits
from torch import nn

import attnrewrite

ATTENTION = ["blocks.0.attn", "blocks.1.attn"]
"""The attentions of the small ViT of timm."""


@torch.no_grad()
def run(model, batch, **options):
    return logits(model(batch, **options))


def rewritten_names(module):
    return sorted(name for name, child in module.named_modules() if hasattr(child, "attnrewrite_rewriting"))


def weights_of(model):
    """Its state, but for what says that it was converted."""
    return {name: value for name, value in model.state_dict().items() if "attnrewrite_converted_to_" not in name}


def converted_sites(module):
    return [site.name for site in attnrewrite.report(module).converted]


def fates(plan):
    return {planned.site.name: planned.status for planned in plan.sites}


def projections_of(model):
    ends = ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
    return [m for n, m in model.named_modules() if n.split(".")[-1] in ends and isinstance(m, nn.Linear)]
