"""The operator ``attnrewrite::local_attention``: every query attends to a window of a 1-D, 2-D or 3-D map, and to keys
that all queries share.

It serves neighborhood attention (Hassani et al. 2023), dilated (Hassani and Shi 2022), strided and causal (Hassani et
al. 2025), and pixel-focused and aggregated attention (Shi 2024, TransNeXt, sections 3.1 and 3.2). With the rule of
``index_rule`` for the window's places:

    output = (softmax([scale * query . key of the window + bias, scale * query . additional key + additional bias])
              + [post, 0]) [values of the window, additional values]

A scale per query is a factor of the query itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import accumulation_dtype
from .attention_problem import AttentionProblem, check_additional, softmax_statistics
from .checks import check_shape
from .index_rule import MASK, AxisRule, attended_pairs, axis_table, check_rules
from .operator import Operator


@dataclass(frozen=True)
class LocalProblem(AttentionProblem):
    """One call; geometry has one entry an axis of the map, as ``index_rule.AxisRule`` explains it.

    Attributes:
        query, key: ``[B, *grid, heads, head_dim]``.
        value: ``[B, *grid, heads, value_dim]``.
        bias: ``[heads, entries an axis]``, added to the window's logits by key minus query in (dilated) steps:
            ``2 * kernel_size - 1`` entries an axis, or ``kernel_size`` where windows keep their query in the middle.
        additional_keys, additional_values: ``[B, additional, heads, head_dim or value_dim]``, seen by every query.
        additional_bias: ``[heads, *grid, additional]``, added to the additional keys' logits.
        place_bias: ``[heads, *grid, places]``, added to the logits of each query's own window (places in row-major
            order), as a mask of minus infinity does.
        post: ``[B, *grid, heads, places]``, added to the weights of the window's places after the softmax; what it has
            for places that are not on the map counts nothing.
        scale: of the dot products.
    """

    name = "local_attention"
    bias: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    additional_bias: Tensor | None
    place_bias: Tensor | None
    post: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    offset: tuple[int, ...]
    is_causal: tuple[bool, ...]
    boundary: str
    scale: float

    @property
    def rules(self) -> tuple[AxisRule, ...]:
        """The rule of each axis."""
        axes = zip(self.grid, self.kernel_size, self.stride, self.dilation, self.is_causal, self.offset, strict=True)
        return tuple(
            AxisRule(length, size, stride, dilation, causal, offset, self.boundary)
            for length, size, stride, dilation, causal, offset in axes
        )

    @property
    def additional(self) -> int:
        """Number of keys beside those of the map."""
        return 0 if self.additional_keys is None else self.additional_keys.shape[1]

    @property
    def places(self) -> int:
        """Places of a window, on the map or not."""
        return prod(self.kernel_size)

    def check(self) -> None:
        self.check_maps()
        check_rules(self.rules)
        batch, heads, *_ = self.sizes
        check_shape("bias", self.bias, (heads, *(rule.bias_length for rule in self.rules)))
        check_additional(self.additional_keys, self.additional_values, self.sizes)
        if self.additional_bias is not None and self.additional_keys is None:
            raise ArgumentError("additional_bias is given without additional_keys: give both or neither")
        check_shape("additional_bias", self.additional_bias, (heads, *self.grid, self.additional))
        check_shape("place_bias", self.place_bias, (heads, *self.grid, self.places))
        check_shape("post", self.post, (batch, *self.grid, heads, self.places))

    def pairs(self) -> int:
        batch, heads, *_ = self.sizes
        return batch * heads * (prod(map(attended_pairs, self.rules)) + prod(self.grid) * self.additional)

    def plain(self, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """One shifted copy of the map for every place of the window; nothing is gathered key by key."""
        window = _Window(self)
        query = window.widened(self.query) * self.scale
        logits = window.logits(query)
        if self.additional_keys is not None:
            additional = torch.einsum("b...hd,bkhd->b...hk", query, window.widened(self.additional_keys))
            if self.additional_bias is not None:
                additional = additional + window.widened(self.additional_bias).movedim(0, -2)
            logits = torch.cat([logits, additional], dim=-1)
        weights, lse = softmax_statistics(logits, dropout)
        in_window = weights[..., : self.places]
        if self.post is not None:
            in_window = in_window + window.on_map(window.widened(self.post))
        output = window.average(in_window)
        if self.additional_values is not None:
            additional_values = window.widened(self.additional_values)
            output = output + torch.einsum("b...hk,bkhd->b...hd", weights[..., self.places :], additional_values)
        return output.to(self.query.dtype), lse


class _Window:
    """The window of every query, place by place: the map as each place sees it."""

    def __init__(self, problem: LocalProblem) -> None:
        self._problem = problem
        self._dtype = accumulation_dtype(problem.query.dtype)
        self._tables = [axis_table(rule, problem.query.device) for rule in problem.rules]
        self._slices = all(rule.is_centered for rule in problem.rules)
        self._cuts = any(rule.is_causal or rule.boundary == MASK for rule in problem.rules)

    def widened(self, operand: Tensor) -> Tensor:
        return operand.to(self._dtype)

    def logits(self, query: Tensor) -> Tensor:
        """``[B, *grid, heads, places]`` of a scaled query; minus infinity where a place is not on the map."""
        scores = torch.stack([(query * key).sum(-1) for key in self._shifted(self._problem.key)], dim=-1)
        if self._problem.bias is not None:
            scores = scores + self.widened(self._problem.bias).flatten(1)[:, self._entries()].movedim(0, -2)
        if self._problem.place_bias is not None:
            scores = scores + self.widened(self._problem.place_bias).movedim(0, -2)
        return scores.masked_fill(~self._valid(), -torch.inf) if self._cuts else scores

    def average(self, weights: Tensor) -> Tensor:
        """``[B, *grid, heads, value_dim]``: the values, by weights ``[B, *grid, heads, places]``."""
        total = torch.zeros_like(self._problem.value, dtype=self._dtype)
        for weight, value in zip(weights.unbind(-1), self._shifted(self._problem.value), strict=True):
            total = total + weight[..., None] * value
        return total

    def on_map(self, weights: Tensor) -> Tensor:
        """Nothing at places that are not on the map."""
        return weights.masked_fill(~self._valid(), 0) if self._cuts else weights

    def _shifted(self, source: Tensor) -> Iterator[Tensor]:
        """The map that each place sees; zero where it sees none."""
        source = self.widened(source)
        yield from self._narrowed(source) if self._slices else self._selected(source, len(self._tables))

    def _narrowed(self, source: Tensor) -> Iterator[Tensor]:
        """Views of the padded map, for windows around their query."""
        rules = self._problem.rules
        pads = [(rule.kernel_size // 2 * rule.dilation, (rule.kernel_size - 1) // 2 * rule.dilation) for rule in rules]
        padded = F.pad(source, (0, 0, 0, 0, *(side for pad in reversed(pads) for side in pad)))
        for place in product(*(range(rule.kernel_size) for rule in rules)):
            view = padded
            for axis, (step, rule) in enumerate(zip(place, rules, strict=True), start=1):
                view = view.narrow(axis, step * rule.dilation, rule.length)
            yield view

    def _selected(self, source: Tensor, axes: int) -> Iterator[Tensor]:
        """Copies of the map, for any rule; recursion, so that rows are copied once for all places of a row."""
        if not axes:
            yield source
            return
        axis = source.dim() - 2 - axes
        table = self._tables[-axes]
        for place in range(table.keys.shape[1]):
            chosen = source.index_select(axis, table.keys[:, place])
            if self._cuts:  # a weight of zero does not hide what is not finite
                shape = (-1, *(1,) * (source.dim() - axis - 1))
                chosen = torch.where(table.valid[:, place].view(shape), chosen, 0)
            yield from self._selected(chosen, axes - 1)

    def _entries(self) -> Tensor:
        """``[*grid, places]``: the flat entry of the bias for each place; any legal one where it is absent."""
        index = torch.zeros((), dtype=torch.long, device=self._problem.query.device)
        for rule, table in zip(self._problem.rules, self._tables, strict=True):
            entry = table.bias_index.clamp(0, rule.bias_length - 1)
            index = _outer(index * rule.bias_length, entry)
        return index.flatten(len(self._tables))

    def _valid(self) -> Tensor:
        """``[*grid, 1, places]``: which places are on the map, for all heads."""
        valid = torch.ones((), dtype=torch.bool, device=self._problem.query.device)
        for table in self._tables:
            valid = _outer(valid, table.valid, is_logical=True)
        return valid.flatten(len(self._tables))[..., None, :]


def _outer(outer: Tensor, inner: Tensor, is_logical: bool = False) -> Tensor:
    """Sum (or conjunction) of ``[*grid, *places]`` and an axis' ``[length, places]``, ``[*grid, length, *places,
    places]``."""
    axes = outer.dim() // 2
    outer = outer.unsqueeze(axes).unsqueeze(-1)
    inner = inner.view(*(1,) * axes, inner.shape[0], *(1,) * axes, inner.shape[1])
    return outer & inner if is_logical else outer + inner


LOCAL_ATTENTION = Operator(LocalProblem)
