"""Random weights that matter."""

from __future__ import annotations

import math

import torch
from torch import nn


def enliven(model: nn.Module) -> nn.Module:
    """Make every weight matter: noise instead of zeros and constants, unit gain instead of almost constant scores."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point():
                _enliven(parameter, generator)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.add_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model


def _enliven(parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.abs().max() < 1e-2 or bool((parameter == parameter.flatten()[0]).all()):
        parameter.add_(0.1 * noise)
    elif parameter.ndim == 2 and (gain := float(parameter.std()) * math.sqrt(parameter.shape[1])) < 1.0:
        parameter.div_(gain)
