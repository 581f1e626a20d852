"""Models for tests of costs, built without their weights."""

import torch
from torch import Tensor, nn

from attnrewrite.hosts.loading import load_model
from attnrewrite.models import create_model


def on_meta(spec: str, **options) -> nn.Module:
    """``timm:NAME``, ``torchvision:NAME``, ``transformers:CLASS``, or a model of this library."""
    with torch.device("meta"):
        return (load_model if ":" in spec else create_model)(spec, **options).eval()


def image(height: int, width: int | None = None, batch: int = 1) -> Tensor:
    return torch.empty(batch, 3, height, width or height, device="meta")
