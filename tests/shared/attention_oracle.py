"""Every operator as loops over its definition, one query or pixel at a time, sharing nothing with the library.

An oracle takes a problem's fields and gives its results, differentiable. What is a list here is one entry an axis.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import torch.nn.functional as F


def axis_places(query, length, kernel, stride=1, dilation=1, causal=False, offset=0, boundary="clamp"):
    """The key at every place of a query's window along one axis (NATTEN's rule), None where there is none."""
    members = [token for token in range(length) if token % dilation == query % dilation]
    place, last = members.index(query), len(members) - 1
    first = next(begin for begin in range(place, place - stride, -1) if (begin - offset) % stride == 0)
    if causal:
        start, stop = max(min(first + stride - 1, last) - kernel + 1, 0), place + 1
    elif boundary == "mask":
        start, stop = first + stride // 2 - kernel // 2, len(members)
    else:
        leader = min(first + stride // 2, last)
        start, stop = min(max(leader - kernel // 2, 0), len(members) - kernel), len(members)
    return [members[own] if 0 <= own < stop else None for own in range(start, start + kernel)]


def axis_keys(*rule):
    """The keys of a query along one axis."""
    return [key for key in axis_places(*rule) if key is not None]


def local(problem):
    """Output and log-sum-exp of local attention."""
    axes = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, problem.offset)
    result = _Results(problem)
    for token in product(*map(range, problem.query.shape[1:-2])):
        places = [
            axis_places(*own, problem.boundary)
            for own in zip(token, problem.query.shape[1:-2], *axes, strict=True)
        ]
        for place, other in enumerate(product(*places)):
            if None in other:
                continue
            term = 0.0
            if problem.bias is not None:
                term = term + problem.bias[(slice(None), *_steps(problem, token, other))]
            if problem.place_bias is not None:
                term = term + problem.place_bias[(slice(None), *token, place)]
            post = 0.0 if problem.post is None else problem.post[(slice(None), *token, slice(None), place)]
            result.see(problem.key[(slice(None), *other)], problem.value[(slice(None), *other)], term, post)
        _see_additional(problem, result, problem.additional_bias, token)
        result.store(token)
    return result.tensors


def _steps(problem, token, other):
    """The entry of the relative bias: it begins half a kernel before a query that is always in the middle."""
    centered = [problem.boundary == "mask" and stride == 1 for stride in problem.stride]
    reach = [k // 2 if middle else k - 1 for k, middle in zip(problem.kernel_size, centered, strict=True)]
    return [(o - t) // d + r for t, o, d, r in zip(token, other, problem.dilation, reach, strict=True)]


PADDING = "padding"


def axis_groups(length, window, shift=0, interval=1, padded=False, rolled=False):
    """``(group, slot, token or PADDING)`` of everything along one axis that is a key."""
    region = window * interval
    end = -(-length // region) * region
    if not rolled:
        return [
            ((place - shift) // region * interval + (place - shift) % interval, (place - shift) % region // interval,
             place if place < length else PADDING)
            for place in range(end if padded else length)
        ]  # fmt: skip
    section = [(place >= end - window) + (shift > 0 and place >= end - shift) for place in range(end)]
    tokens = [(place + shift) % length if place < length else PADDING for place in range(end)]
    found = [((place // window, section[place]), place % window, tokens[place]) for place in range(end)]
    return found if padded else [each for each in found if each[2] != PADDING]


def grouped(problem):
    """Output and log-sum-exp of grouped attention."""
    padded, result = problem.pad_key is not None, _Results(problem)
    geometry = zip(
        problem.query.shape[1:-2], problem.window_size, problem.shift, problem.interval, strict=True
    )
    axes = [axis_groups(*axis, padded, problem.rolled) for axis in geometry]
    for own in product(*axes):
        token = tuple(each[2] for each in own)
        if PADDING in token:
            continue
        for other in product(*axes):
            if any(a[0] != b[0] for a, b in zip(own, other, strict=True)):
                continue
            place = tuple(each[2] for each in other)
            if PADDING in place:
                key, value = problem.pad_key, problem.pad_value
            else:
                key, value = problem.key[(slice(None), *place)], problem.value[(slice(None), *place)]
            term = 0.0
            if problem.bias is not None:
                term = problem.bias[:, _slot(problem, own), _slot(problem, other)]
            result.see(key, value, term)
        _see_additional(problem, result, None, token)
        result.store(token)
    return result.tensors


def _slot(problem, place):
    """Row-major number of a slot of a full group."""
    window = problem.window_size
    return sum(each[1] * prod(window[axis + 1 :]) for axis, each in enumerate(place))


def biased(problem):
    """Output and log-sum-exp of biased attention."""
    result, prefix = _Results(problem), problem.prefix_tokens
    queries, keys = ([None] * prefix + list(product(*map(range, s))) for s in (problem.sides, problem.key_sides))
    for token, own in enumerate(queries):
        for other, cell in enumerate(keys):
            on_map = own is not None and cell is not None
            term = _positional(problem, own, cell) if on_map else 0.0
            result.see(problem.key[:, other], problem.value[:, other], term)
        result.store((token,))
    return result.tensors


def _positional(problem, own, cell):
    term = 0.0
    if problem.log_decay is not None:
        centers = [
            (c + 0.5) * side / cells - 0.5
            for c, side, cells in zip(cell, problem.sides, problem.key_sides, strict=True)
        ]
        term = problem.log_decay * sum(abs(o - center) for o, center in zip(own, centers, strict=True))
    if problem.table is not None:
        entry = [c - o + side - 1 for c, o, side in zip(cell, own, problem.sides, strict=True)]
        term = term + problem.table[:, entry[0], entry[1]]
    return term


def axial(problem):
    """Output and log-sum-exp of axial attention; axis 1 is along rows."""
    result, grid = _Results(problem), problem.query.shape[1:3]
    for token in product(*map(range, grid)):
        for place in range(grid[problem.axis]):
            other = (token[0], place) if problem.axis == 1 else (place, token[1])
            distance = abs(place - token[problem.axis])
            term = 0.0 if problem.log_decay is None else problem.log_decay * distance
            result.see(problem.key[(slice(None), *other)], problem.value[(slice(None), *other)], term)
        result.store(token)
    return result.tensors


def conv_glu(problem):
    """The gated map."""
    before, after = (_ACTIVATIONS[name] for name in (problem.pre_activation, problem.activation))
    height, width = problem.gate.shape[1:3]
    half = problem.weight.shape[-1] // 2
    hidden, rows = before(problem.gate), []
    for y, x in product(range(height), range(width)):
        total = torch.zeros_like(hidden[:, 0, 0])
        for down, across in product(range(-half, half + 1), repeat=2):
            if 0 <= y + down < height and 0 <= x + across < width:
                total = total + hidden[:, y + down, x + across] * problem.weight[:, 0, down + half, across + half]
        gated = after(total if problem.bias is None else total + problem.bias)
        rows.append(gated if problem.value is None else gated * problem.value[:, y, x])
    return (torch.stack(rows, dim=1).unflatten(1, (height, width)),)


_ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
}


def soft_split(problem):
    """The projected patches."""
    kernel, stride, padding = problem.kernel_size, problem.stride, problem.padding
    image = F.pad(problem.image, (padding,) * 4)
    rows, columns = ((side - kernel) // stride + 1 for side in image.shape[2:])
    cells = []
    for y, x in product(range(rows), range(columns)):
        patch = image[:, :, y * stride : y * stride + kernel, x * stride : x * stride + kernel].flatten(1)
        if problem.norm_weight is not None:
            centered = patch - patch.mean(1, keepdim=True)
            deviation = (centered.square().mean(1, keepdim=True) + problem.eps).sqrt()
            patch = centered / deviation * problem.norm_weight + problem.norm_bias
        projected = (patch[:, None] * problem.weight).sum(-1)
        cells.append(projected if problem.bias is None else projected + problem.bias)
    return (torch.stack(cells, dim=1).unflatten(1, (rows, columns)),)


def _see_additional(problem, result, bias, token):
    if problem.additional_keys is None:
        return
    for number in range(problem.additional_keys.shape[1]):
        term = 0.0 if bias is None else bias[(slice(None), *token, number)]
        result.see(problem.additional_keys[:, number], problem.additional_values[:, number], term)


class _Results:
    """Output and log-sum-exp, filled one query at a time, for all images and heads together."""

    def __init__(self, problem):
        self._problem, self._seen = problem, []
        query = problem.query
        self.tensors = query.new_zeros(*query.shape[:-1], problem.value.shape[-1]), query.new_zeros(query.shape[:-1])

    def see(self, key, value, term, post=0.0):
        """The next query sees a key ``[B, heads, dim]`` (or one for all images); ``post`` adds to its weight."""
        self._seen.append((key, value, term, post))

    def store(self, token):
        place, problem = (slice(None), *token), self._problem
        query, like = problem.query[place], self.tensors[1][place]
        logits = [(query * key).sum(-1) * problem.scale + term for key, _, term, _ in self._seen]
        logits = torch.stack(logits, dim=-1)
        weights = logits.softmax(-1)
        posts = torch.stack([like + post for *_, post in self._seen], dim=-1)
        self.tensors[1][place] = logits.logsumexp(-1)
        self.tensors[0][place] = sum(
            (weights[..., number] + posts[..., number])[..., None] * value
            for number, (_, value, _, _) in enumerate(self._seen)
        )
        self._seen = []


ORACLES = {
    "local_attention": local,
    "grouped_attention": grouped,
    "biased_attention": biased,
    "axial_attention": axial,
    "conv_glu": conv_glu,
    "soft_split": soft_split,
}
