"""Manhattan self-attention (MaSA) of RMT (Fan et al., CVPR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, nearest
from .decay import ManhattanPosition, PositionTables, axis_bias, map_bias, map_code, rotate
from .depthwise import DepthwiseConv

PLACEMENTS = ("inside", "outside")
BIAS_TOKENS = 1024
"""On maps up to this size a bias costs less than position codes; it is built anew in every call."""


class ManhattanAttention(nn.Module):
    """Attention whose weights decay with the Manhattan distance on the map, for maps of any size.

    ``out_proj(attention + lepe(value))``, the attention being `manhattan_attention` of the projected map and ``lepe``
    a depthwise 5 x 5 convolution, the paper's local context enhancement. It holds no table: see `ManhattanPosition`.

    Args:
        dim: channels of the map.
        num_heads: heads; they divide ``dim``.
        decomposed: attend along rows, then along columns, instead of to the whole map.
        initial_decay, decay_range, rotary: of `ManhattanPosition`.
        decay_placement: of `manhattan_attention`.
        lce: whether there is a local context enhancement.

    Raises:
        ArgumentError: for arguments that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decomposed: bool = False,
        initial_decay: float = 2,
        decay_range: float = 4,
        rotary: str = "raster",
        decay_placement: str = "inside",
        lce: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ArgumentError(f"num_heads: must divide dim={dim}, got {num_heads}")
        check_placement(decay_placement, "decay_placement")
        self.num_heads, self.decomposed, self.decay_placement = num_heads, decomposed, decay_placement
        self.position = ManhattanPosition(dim // num_heads, num_heads, initial_decay, decay_range, rotary)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5) if lce else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor, tables: PositionTables | None = None) -> Tensor:
        """``[B, H, W, dim]`` to the same shape.

        Args:
            source: the map.
            tables: of its size, shared by several blocks; None computes them.
        """
        height, width = source.shape[1:3]
        tables = tables or self.position(height, width, source)
        value = self.v_proj(source)
        query, key, heads = (
            part.unflatten(-1, (self.num_heads, -1)) for part in (self.q_proj(source), self.k_proj(source), value)
        )
        if tables.cos is not None and tables.sin is not None:
            query, key = (rotate(part, tables.cos, tables.sin) for part in (query, key))
        mixed = manhattan_attention(
            query, key, heads, tables.log_decay, decomposed=self.decomposed, decay_placement=self.decay_placement
        ).flatten(-2)
        return self.out_proj(mixed if self.lepe is None else mixed + self.lepe(value))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, decomposed={self.decomposed}, decay_placement={self.decay_placement!r}"


def manhattan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    decomposed: bool = False,
    decay_placement: str = "inside",
    scale: float | None = None,
) -> Tensor:
    """Attention with decay by Manhattan distance (Fan et al. 2024, section 3).

    The decomposed form builds biases ``[heads, W, W]`` and ``[heads, H, H]``. The full form with the decay inside
    builds ``[heads, H * W, H * W]`` on maps of up to `BIAS_TOKENS`, and on larger ones nothing of that size, forward or
    backward: the distance is an inner product of position codes (`map_code`), which are appended to queries and keys,
    so that fused attention without mask does the rest. With the decay outside the attention weights themselves are
    built, ``[B, heads, H * W, H * W]`` in the full form.

    Args:
        query, key, value: ``[B, H, W, heads, head_dim]``.
        log_decay: ``[heads]``, natural logarithm of each head's decay a step; in float32 or float64.
        decomposed: attend along rows, then, with the same queries and keys, along columns to what the rows gave.
        decay_placement: ``"inside"`` adds ``log_decay * distance`` to the logits, so that the weights still sum to 1
            (all released code); ``"outside"`` multiplies the weights after the softmax (the paper's equation).
        scale: of the dot products; None is ``head_dim ** -0.5``.

    Returns:
        ``[B, H, W, heads, head_dim]``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
    """
    check_placement(decay_placement, "decay_placement")
    if query.ndim != 5 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(list(part.shape)) for part in (query, key, value))
        raise ArgumentError(f"query, key, value: must all be [B, H, W, heads, head_dim], got {shapes}")
    if log_decay.shape != query.shape[3:4]:
        raise ArgumentError(f"log_decay: must be [{query.shape[3]}], one a head, got {list(log_decay.shape)}")
    inside = decay_placement == "inside"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if decomposed:
        value = _along_rows(query, key, value, log_decay, inside, scale)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return _along_rows(query, key, value, log_decay, inside, scale).transpose(1, 2)
    return _over_the_map(query, key, value, log_decay, inside, scale)


def _along_rows(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, inside: bool, scale: float) -> Tensor:
    """Every token attends to its row."""
    batch, height, width = query.shape[:3]
    query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    mixed = _with_bias(query, key, value, axis_bias(log_decay, width), inside, scale)
    return mixed.transpose(1, 2).unflatten(0, (batch, height))


def _over_the_map(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, inside: bool, scale: float) -> Tensor:
    """Every token attends to the whole map."""
    height, width = query.shape[1:3]
    query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))
    # an exported graph has one branch for all sizes
    small = not torch.compiler.is_exporting() and height * width <= BIAS_TOKENS
    if small or not inside:
        mixed = _with_bias(query, key, value, map_bias(log_decay, height, width), inside, scale)
    else:
        code = map_code(height, width, log_decay.dtype, log_decay.device)
        mixed = _with_codes(query, key, value, log_decay, code, scale)
    return mixed.transpose(1, 2).unflatten(1, (height, width))


def _with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, inside: bool, scale: float) -> Tensor:
    """Operands ``[B, heads, tokens, head_dim]``, bias ``[heads, tokens, tokens]``."""
    if inside:  # fused kernels want a mask of as many axes as the operands
        return F.scaled_dot_product_attention(query, key, value, bias[None].to(query.dtype), scale=scale)
    weights = ((query * scale) @ key.transpose(-1, -2)).softmax(-1)
    return (weights * bias.exp().to(weights.dtype)).to(value.dtype) @ value


def _with_codes(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, code: Tensor, scale: float) -> Tensor:
    """As with the bias ``log_decay * distance`` inside, from the codes ``[tokens, code]`` of `map_code`."""
    # twice the distance is a constant, which the softmax does not see, less the inner product of the codes
    steepness = (log_decay * (-0.5 / scale))[:, None, None] * code
    query, key = (
        torch.cat([part, extra.to(part.dtype).expand(*part.shape[:2], -1, -1)], dim=-1)
        for part, extra in ((query, steepness), (key, code))
    )
    padded = F.pad(value, (0, code.shape[-1]))  # fused kernels want all three as wide
    return F.scaled_dot_product_attention(query, key, padded, scale=scale)[..., : value.shape[-1]]


def check_placement(placement: str, argument: str) -> None:
    if placement not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise ArgumentError(f"{argument}: must be one of {known}, got {placement!r}{nearest(placement, PLACEMENTS)}")
