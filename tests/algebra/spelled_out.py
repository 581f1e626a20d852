"""Every kind of site spelled out in plain products, for counting: shapes are all that matters."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weight(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def linear(source: Tensor, out: int) -> Tensor:
    return F.linear(source, weight(out, source.shape[-1]))


def attend(query: Tensor, key: Tensor, value: Tensor, fused: bool) -> Tensor:
    if fused:
        return F.scaled_dot_product_attention(query, key, value)
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


def heads_of(source: Tensor, heads: int) -> Tensor:
    return source.unflatten(-1, (heads, -1)).transpose(-2, -3)


def multi_head(query: Tensor, source: Tensor, heads: int, fused: bool) -> Tensor:
    width = query.shape[-1]
    parts = (linear(query, width), linear(source, width), linear(source, width))
    mixed = attend(*(heads_of(part, heads) for part in parts), fused)
    return linear(mixed.transpose(-2, -3).flatten(-2), width)


def full(source: Tensor, heads: int, fused: bool, prefix: int = 0) -> Tensor:
    tokens = source.flatten(1, 2)
    return multi_head(*(2 * (F.pad(tokens, (0, 0, prefix, 0)),)), heads, fused)


def windows(source: Tensor, heads: int, fused: bool, size: int) -> Tensor:
    height, width = source.shape[1:3]
    padded = F.pad(source, (0, 0, 0, -width % size, 0, -height % size))
    blocks = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return multi_head(blocks, blocks, heads, fused)


def reduced(source: Tensor, heads: int, fused: bool, ratio: int) -> Tensor:
    width = source.shape[-1]
    small = F.conv2d(source.permute(0, 3, 1, 2), weight(width, width, ratio, ratio), stride=ratio)
    return multi_head(source.flatten(1, 2), small.flatten(2).transpose(1, 2), heads, fused)


def linearly_reduced(source: Tensor, heads: int, fused: bool, pool: int) -> Tensor:
    width = source.shape[-1]
    small = F.conv2d(F.adaptive_avg_pool2d(source.permute(0, 3, 1, 2), pool), weight(width, width, 1, 1))
    return multi_head(source.flatten(1, 2), small.flatten(2).transpose(1, 2), heads, fused)


def unfolded(source: Tensor, heads: int, kernel: int) -> Tensor:
    """``[B, heads, tokens, kernel ** 2, head_dim]``."""
    patches = F.unfold(source.permute(0, 3, 1, 2), kernel, padding=kernel // 2)
    return patches.unflatten(1, (heads, -1, kernel**2)).permute(0, 1, 4, 3, 2)


def neighborhood(source: Tensor, heads: int, kernel: int, prefix: int = 0) -> Tensor:
    """Prefix tokens join every window and see everything."""
    height, columns, width = source.shape[1:]
    tokens = F.pad(source.flatten(1, 2), (0, 0, prefix, 0))
    query, key, value = (linear(tokens, width) for _ in range(3))
    of_map = [part[:, prefix:].unflatten(1, (height, columns)) for part in (query, key, value)]
    local = [unfolded(part, heads, kernel) for part in of_map[1:]]
    if prefix:
        extra = [
            heads_of(part[:, :prefix], heads)[:, :, None].expand(-1, -1, height * columns, -1, -1)
            for part in (key, value)
        ]
        local = [torch.cat(pair, dim=3) for pair in zip(extra, local, strict=True)]
        attend(heads_of(query[:, :prefix], heads), heads_of(key, heads), heads_of(value, heads), fused=False)
    scores = heads_of(of_map[0].flatten(1, 2), heads)[..., None, :] @ local[0].transpose(-1, -2)
    scores.softmax(-1) @ local[1]
    return linear(tokens, width)


def aggregated(source: Tensor, heads: int, kernel: int, pool: int, learnable: bool) -> Tensor:
    width, tokens = source.shape[-1], source.flatten(1, 2)
    query, key, value = linear(tokens, width), linear(tokens, width), linear(tokens, width)
    small = F.adaptive_avg_pool2d(linear(source, width).permute(0, 3, 1, 2), pool).flatten(2).transpose(1, 2)
    pooled_key, pooled_value = linear(small, width), linear(small, width)
    grid = source.shape[1:3]
    local_key, local_value = (unfolded(part.unflatten(1, grid), heads, kernel) for part in (key, value))
    scores = heads_of(query, heads)[..., None, :] @ local_key.transpose(-1, -2)
    pooled = heads_of(query, heads) @ heads_of(pooled_key, heads).transpose(-1, -2)
    if learnable:
        heads_of(query, heads) @ weight(heads, width // heads, kernel**2)
    scores.softmax(-1) @ local_value
    pooled.softmax(-1) @ heads_of(pooled_value, heads)
    return linear(tokens, width)


def manhattan(source: Tensor, heads: int, fused: bool, decomposed: bool) -> Tensor:
    width = source.shape[-1]
    query, key, value = (linear(source, width).unflatten(-1, (heads, -1)) for _ in range(3))
    F.conv2d(source.permute(0, 3, 1, 2), weight(width, 1, 5, 5), padding=2, groups=width)
    if decomposed:
        rows = [part.transpose(2, 3) for part in (query, key, value)]
        columns = [part.permute(0, 2, 3, 1, 4) for part in (query, key, value)]
        attend(*rows, fused)
        attend(*columns, fused)
    else:
        attend(*(part.flatten(1, 2).transpose(1, 2) for part in (query, key, value)), fused)
    return linear(source, width)


def grouped(source: Tensor, heads: int, fused: bool, group: int, interval: int) -> Tensor:
    """Group by group, each with the tokens it has; the position network runs on all offsets once."""
    height, columns, width = source.shape[1:]
    shorter = min(height, columns)
    if shorter <= group:
        group, interval = min(group, shorter), 1
    query, key, value = linear(source, 3 * width).chunk(3, -1)
    for rows in members(height, group, interval):
        for places in members(columns, group, interval):
            parts = (part[:, rows][:, :, places].flatten(1, 2) for part in (query, key, value))
            attend(*(heads_of(part, heads) for part in parts), fused)
    hidden = linear(weight((2 * group - 1) ** 2, 2), width // 16)
    linear(linear(linear(hidden, width // 16), width // 16), heads)
    return linear(source, width)


def members(side: int, group: int, interval: int) -> list[list[int]]:
    """The tokens of every group of an axis."""
    region = group * interval
    starts = [first + residue for first in range(0, side, region) for residue in range(interval)]
    groups = [[token for token in range(start, start + region, interval) if token < side] for start in starts]
    return [tokens for tokens in groups if tokens]


def mlp(source: Tensor, hidden: int, gated: bool, depthwise: int) -> Tensor:
    inner = linear(source, 2 * hidden if gated else hidden)
    main = inner.chunk(2, -1)[0] if gated else inner
    if depthwise:
        filters = weight(hidden, 1, depthwise, depthwise)
        F.conv2d(main.permute(0, 3, 1, 2), filters, padding=depthwise // 2, groups=hidden)
    return linear(main, source.shape[-1])


def token_layer(tokens: Tensor, width: int, performer: bool, fused: bool) -> Tensor:
    query, key, value = linear(tokens, 3 * width).chunk(3, -1)
    if performer:
        query, key = (part @ weight(width, width // 2) for part in (query, key))
        mixed = query @ (key.transpose(1, 2) @ value)
        query @ key.sum(1).unsqueeze(-1)
    else:
        mixed = attend(query[:, None], key[:, None], value[:, None], fused)[:, 0]
    return linear(linear(linear(mixed, width), width), width)
