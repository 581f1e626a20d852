"""How many heads the channels of an attention layer can be split into."""

from __future__ import annotations

from ..errors import ArgumentError


def require_heads(dim: int, num_heads: int) -> None:
    """Raises:
    ArgumentError: if ``num_heads`` does not divide ``dim``.
    """
    if num_heads < 1 or dim % num_heads:
        raise ArgumentError(f"num_heads: must divide dim={dim}, got {num_heads}")
