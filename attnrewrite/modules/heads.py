"""The heads that the channels of an attention layer are split into."""

from __future__ import annotations

from torch import nn

from ..algebra.site_formula import Widths
from ..errors import ArgumentError


def require_heads(dim: int, num_heads: int) -> None:
    """Raises:
    ArgumentError: if ``num_heads`` does not divide ``dim``.
    """
    if num_heads < 1 or dim % num_heads:
        raise ArgumentError(f"num_heads: must divide dim={dim}, got {num_heads}")


def widths_of(out_proj: nn.Linear, num_heads: int) -> Widths:
    """Of an attention layer whose result goes through ``out_proj``."""
    return Widths(out_proj.out_features, num_heads, out_proj.in_features)
