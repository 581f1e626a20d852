"""The initial weights that most hierarchical vision transformers share (Wang et al. 2022, PVT v2)."""

from __future__ import annotations

import math

from torch import nn


def initialize(module: nn.Module) -> None:
    """For ``Module.apply``: linear maps truncated normal with deviation 0.02, convolutions He normal by their outputs;
    biases 0, norms the identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
