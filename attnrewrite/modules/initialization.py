"""The initial weights that vision transformers share."""

from __future__ import annotations

import math

from torch import nn


def initialize_linear(module: nn.Module) -> None:
    """For ``Module.apply``: linear maps truncated normal with deviation 0.02, their biases 0; the rest stays."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize(module: nn.Module) -> None:
    """As ``initialize_linear``, and convolutions He normal by their outputs, biases 0, norms the identity (Wang et al.
    2022, PVT v2)."""
    initialize_linear(module)
    if isinstance(module, nn.Conv2d):
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
