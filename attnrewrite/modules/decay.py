"""Manhattan decay and raster rotary position of RMT (Fan et al. 2024), as functions of the size of the map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, nearest

ROTARY = ("raster", "none")


class PositionTables(NamedTuple):
    """What the blocks of one stage share.

    Attributes:
        log_decay: ``[heads]``, ``ln gamma``, at most 0.
        cos, sin: ``[H, W, head_dim / 2]``, of each pair's phase; None without rotary position.
    """

    log_decay: Tensor
    cos: Tensor | None
    sin: Tensor | None


class ManhattanPosition(nn.Module):
    """Position tables for maps of any size; it has no state, so that casting a model cannot corrupt them.

    Args:
        head_dim: channels of a head; even with rotary position.
        num_heads: heads.
        initial_decay, decay_range: head ``n`` decays by ``gamma = 1 - 2 ** -(initial_decay + decay_range * n / heads)``
            a step; an ``initial_decay`` of ``math.inf`` means no decay.
        rotary: ``"raster"`` rotates queries and keys by the index in row-major order, as the code of June 2024 does;
            ``"none"`` does not, as in the paper and the code of December 2023.

    Raises:
        ArgumentError: for another kind of rotary position, or an odd head_dim with it.
    """

    def __init__(
        self, head_dim: int, num_heads: int, initial_decay: float = 2, decay_range: float = 4, rotary: str = "raster"
    ) -> None:
        super().__init__()
        if rotary not in ROTARY:
            raise ArgumentError(f"rotary: must be one of {', '.join(ROTARY)}, got {rotary!r}{nearest(rotary, ROTARY)}")
        if rotary != "none" and head_dim % 2:
            raise ArgumentError(
                f"head_dim: must be even for rotary position embedding, got {head_dim}; use rotary='none'"
            )
        self.head_dim, self.num_heads = head_dim, num_heads
        self.initial_decay, self.decay_range, self.rotary = initial_decay, decay_range, rotary

    def forward(self, height: int, width: int, like: Tensor) -> PositionTables:
        """Tables on the device of ``like``, in float64 if it is float64, else in float32 (never less: in bfloat16 the
        phases of a 56 x 56 map would be off by up to 2 radians)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        decay = log_decay(self.num_heads, self.initial_decay, self.decay_range, dtype, like.device)
        if self.rotary == "none":
            return PositionTables(decay, None, None)
        index = torch.arange(height * width, dtype=dtype, device=like.device).unflatten(0, (height, width))
        phase = index[..., None] * rotary_angles(self.head_dim, dtype, like.device)
        return PositionTables(decay, phase.cos(), phase.sin())

    def extra_repr(self) -> str:
        return f"initial_decay={self.initial_decay}, decay_range={self.decay_range}, rotary={self.rotary!r}"


def log_decay(
    heads: int, initial: float, span: float, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """``[heads]``: ``ln(1 - 2 ** -(initial + span * n / heads))`` for head ``n``."""
    steps = torch.arange(heads, dtype=dtype, device=device) / heads
    return torch.log1p(-torch.exp2(-(initial + span * steps)))


def rotary_angles(head_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """``[head_dim / 2]``: radians a step, from 1 to 1e-4 with both ends, evenly spaced in the logarithm."""
    return 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=dtype, device=device)


def rotate(source: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channel pairs ``(a, b)`` to ``(a cos - b sin, b cos + a sin)``.

    Args:
        source: ``[B, H, W, heads, head_dim]``.
        cos, sin: ``[H, W, head_dim / 2]``; they are cast to the dtype of ``source``.
    """
    first, second = source.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[:, :, None].to(source.dtype) for table in (cos, sin))
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
