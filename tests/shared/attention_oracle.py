"""Scalar-loop oracles, written from the definitions and sharing nothing with the library."""

from __future__ import annotations

from itertools import product
from math import prod

import torch


def axis_keys(query, length, kernel, stride=1, dilation=1, causal=False):
    """Keys of a query along one axis (NATTEN's rule)."""
    group = query % dilation
    members = [token for token in range(length) if token % dilation == group]
    place = members.index(query)
    if causal:
        leader = min(place // stride * stride + stride - 1, len(members) - 1)
        return members[max(leader - kernel + 1, 0) : place + 1]
    leader = min(place // stride * stride + stride // 2, len(members) - 1)
    start = min(max(leader - kernel // 2, 0), len(members) - kernel)
    return members[start : start + kernel]


def neighborhood(
    query, key, value, kernel, stride, dilation, causal, scale, bias=None, extra_k=None, extra_v=None
):
    """Output and log-sum-exp, differentiable, one query and head at a time."""
    batch, *grid, heads, _ = query.shape
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = query.new_zeros(query.shape[:-1])
    for image, head in product(range(batch), range(heads)):
        for place in product(*map(range, grid)):
            axes = list(map(axis_keys, place, grid, kernel, stride, dilation, causal))
            seen = list(product(*axes))
            keys = [key[(image, *other, head)] for other in seen]
            values = [value[(image, *other, head)] for other in seen]
            terms = [_relative(bias, head, place, other, kernel, dilation) for other in seen]
            if extra_k is not None:
                keys += list(extra_k[image, :, head])
                values += list(extra_v[image, :, head])
                terms += [0.0] * extra_k.shape[1]
            logits = torch.stack(keys) @ query[(image, *place, head)] * scale + query.new_tensor([0.0])
            logits = logits + torch.stack([torch.as_tensor(term, dtype=query.dtype) for term in terms])
            lse[(image, *place, head)] = logits.logsumexp(0)
            output[(image, *place, head)] = logits.softmax(0) @ torch.stack(values)
    return output, lse


def _relative(bias, head, place, other, kernel, dilation):
    if bias is None:
        return 0.0
    steps = [(o - p) // d + k - 1 for p, o, k, d in zip(place, other, kernel, dilation, strict=True)]
    return bias[(head, *steps)]


def windows(query, key, value, window, shift, scale, bias=None, pad_key=None, pad_value=None):
    """Output and log-sum-exp of grouped attention, one query and head at a time."""
    batch, *grid, heads, _ = query.shape
    padded = [-(-size // w) * w for size, w in zip(grid, window, strict=True)]
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = query.new_zeros(query.shape[:-1])
    extent = grid if pad_key is None else padded
    for image, head in product(range(batch), range(heads)):
        for place in product(*map(range, grid)):
            keys, values, terms = [], [], []
            own = _slot(place, window, shift)
            for other in product(*map(range, extent)):
                if _block(other, window, shift) != _block(place, window, shift):
                    continue
                inside = all(o < size for o, size in zip(other, grid, strict=True))
                keys.append(key[(image, *other, head)] if inside else pad_key[head])
                values.append(value[(image, *other, head)] if inside else pad_value[head])
                term = query.new_tensor(0.0) if bias is None else bias[head, own, _slot(other, window, shift)]
                terms.append(term)
            logits = torch.stack(keys) @ query[(image, *place, head)] * scale + torch.stack(terms)
            lse[(image, *place, head)] = logits.logsumexp(0)
            output[(image, *place, head)] = logits.softmax(0) @ torch.stack(values)
    return output, lse


def _block(place, window, shift):
    return tuple((p - s) // w for p, w, s in zip(place, window, shift, strict=True))


def _slot(place, window, shift):
    inside = [(p - s) % w for p, w, s in zip(place, window, shift, strict=True)]
    return sum(c * prod(window[axis + 1 :]) for axis, c in enumerate(inside))
