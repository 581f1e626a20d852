"""Initial weights of linear maps."""

from __future__ import annotations

from torch import nn


def initialize_linear(module: nn.Module) -> None:
    """For ``Module.apply``: linear maps truncated normal with deviation 0.02, their biases 0; the rest stays."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
