"""Donors of timm whose attention is computed by a function of its operands, in the place of their own softmax."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from attention_definitions import Operands
from timm.layers import Attention as VitAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.twins import GlobalSubSampleAttn
from torch import Tensor, nn

Mix = Callable[[Operands], Tensor | None]
"""Mixed values ``[batch, tokens, heads, dim]`` of an attention, or None where the donor's own is wanted."""


def mixed_donor(donor: nn.Module, mix: Mix) -> nn.Module:
    """A copy of ``donor`` whose attentions, in order, are what ``mix`` says."""
    model = copy.deepcopy(donor)
    index = 0
    for module in model.modules():
        for kind, replaced in _REPLACED.items():
            if isinstance(module, kind):
                replaced(module, model, index, mix)
                index += 1
    assert index
    return model


def operands_of(donor: nn.Module, batch: Tensor) -> list[Operands]:
    """Of every attention of ``donor``, in order, as ``batch`` runs through it."""
    found: list[Operands] = []
    with torch.no_grad():
        mixed_donor(donor, found.append)(batch)  # type: ignore[arg-type]  # a list takes anything
    return found


def key_minus_query_table(attention: nn.Module) -> Tensor:
    """``[heads, 2m-1, 2m-1]``; timm's is by query minus key."""
    rows, columns = attention.window_size
    table = attention.relative_position_bias_table.T.unflatten(1, (2 * rows - 1, 2 * columns - 1))
    return table.flip(1, 2)


def _in_heads(linear: nn.Linear, tokens: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return linear(tokens).unflatten(-1, (parts, heads, -1)).unbind(2)


def _replace_vit(attention: Any, model: Any, index: int, mix: Mix) -> None:
    own = attention.forward

    def forward(x: Tensor, **rest: Any) -> Tensor:
        query, key, value = _in_heads(attention.qkv, x, 3, attention.num_heads)
        query, key = attention.q_norm(query), attention.k_norm(key)
        op = Operands(
            index, query, key, value, attention.scale, tuple(model.patch_embed.grid_size), model.num_prefix_tokens
        )
        mixed = mix(op)
        return own(x, **rest) if mixed is None else attention.proj(mixed.flatten(2))

    attention.forward = forward


def _replace_swin(block: Any, model: Any, index: int, mix: Mix) -> None:
    own, attention = block._attn, block.attn

    def forward(x: Tensor) -> Tensor:
        query, key, value = _in_heads(attention.qkv, x.flatten(1, 2), 3, attention.num_heads)
        op = Operands(
            index, query, key, value, attention.scale, tuple(x.shape[1:3]), table=key_minus_query_table(attention),
            window=tuple(attention.window_size), shifted=any(block.shift_size),
        )  # fmt: skip
        mixed = mix(op)
        return own(x) if mixed is None else attention.proj(mixed.flatten(2)).view_as(x)

    block._attn = forward


def _replace_reduced(attention: Any, model: Any, index: int, mix: Mix) -> None:
    own = attention.forward

    def forward(x: Tensor, sides: Any) -> Tensor:
        (query,) = _in_heads(attention.q, x, 1, attention.num_heads)
        own_key, own_value = _in_heads(attention.kv, x, 2, attention.num_heads)
        if attention.sr is None:
            op = Operands(index, query, own_key, own_value, attention.scale, tuple(sides))
        else:
            image = x.transpose(1, 2).unflatten(2, tuple(sides))
            linear = getattr(attention, "pool", None)
            image = attention.sr(image if linear is None else linear(image))
            tokens = attention.norm(image.flatten(2).transpose(1, 2))
            tokens = tokens if linear is None else attention.act(tokens)
            key, value = _in_heads(attention.kv, tokens, 2, attention.num_heads)
            op = Operands(
                index, query, key, value, attention.scale, tuple(sides), reduced=tuple(image.shape[2:]),
                own_key=own_key, own_value=own_value, tokens=x,
            )  # fmt: skip
        mixed = mix(op)
        return own(x, sides) if mixed is None else attention.proj(mixed.flatten(2))

    attention.forward = forward


_REPLACED = {
    VitAttention: _replace_vit,
    SwinTransformerBlock: _replace_swin,
    PvtAttention: _replace_reduced,
    GlobalSubSampleAttn: _replace_reduced,
}
