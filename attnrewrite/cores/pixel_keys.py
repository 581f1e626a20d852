"""Keys and values of the tokens themselves, where a site had those of a reduced map."""

from __future__ import annotations

from torch import Tensor, nn

from ..ir.core import AttentionCore, Operands


class PixelKeys(AttentionCore):
    """Projects tokens to keys and values of its own, and mixes those by another core: PVT's reducer is gone.

    Args:
        core: of heads-last queries, keys and values of one map.
        channels: of the tokens.
        heads, key_dim, value_dim: of the projections.
    """

    operands = Operands.TOKENS

    def __init__(self, core: AttentionCore, channels: int, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.core, self.heads, self.grid = core, heads, core.grid
        self.key = nn.Linear(channels, heads * key_dim)
        self.value = nn.Linear(channels, heads * value_dim)

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear]:
        return self.key, self.value

    @property
    def mixing(self) -> AttentionCore:
        return self.core

    def forward(self, query: Tensor, *, pixels: Tensor) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]`` queries; ``pixels`` ``[batch, tokens, channels]``."""
        key, value = (linear(pixels).unflatten(-1, (self.heads, -1)) for linear in (self.key, self.value))
        return self.core(query, key, value)
