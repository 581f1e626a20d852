"""Weights that hide nothing."""

from __future__ import annotations

import torch
from torch import nn


def randomized(model: nn.Module) -> nn.Module:
    """The model in eval mode, with weights so large that attention is far from uniform, and no bias table, norm or
    scale trivial. Always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim < 2 or parameter[0].numel() == 1:
                parameter.copy_(0.5 + 0.2 * noise)
            elif "relative_position" in name or name.endswith("table"):
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return model.eval()


def perturbed(model: nn.Module, size: float = 0.1) -> nn.Module:
    """The model in eval mode, near its own weights, with no table, norm or bias whose zeros would hide a fault.
    Always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()
