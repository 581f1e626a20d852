"""Tensors of any layout inside larger storages of poison, which shows reads and writes outside of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

GUARD = 64  # numbers of poison before and behind a tensor: more than a vector register holds


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage.

    ``order`` lists the axes from the outermost in memory to the innermost. Along each axis the tensor takes one of
    ``step`` places, and ``gap`` places of poison follow: ``spacings`` are these pairs. Axes that are ``expanded`` have
    stride 0, and ``offset`` shifts all. What is ``negated``, as ``imag`` of a conjugate is, holds the opposite in its
    storage.
    """

    order: tuple[int, ...]
    spacings: tuple[tuple[int, int], ...]
    expanded: tuple[bool, ...]
    offset: int
    negated: bool
    poison: float


@dataclass(frozen=True)
class Guarded:
    """A tensor, the storage around it, and what that storage held."""

    tensor: Tensor
    storage: Tensor
    before: Tensor

    def plain(self) -> Tensor:
        """A contiguous copy."""
        return self.tensor.resolve_neg().clone(memory_format=torch.contiguous_format)

    def is_untouched(self) -> bool:
        """To the bit, as NaN is not equal to itself."""
        return torch.equal(self.storage.view(torch.uint8), self.before.view(torch.uint8))


def layouts(rank: int, may_expand: bool = True) -> st.SearchStrategy[Layout]:
    """Layouts of a tensor with ``rank`` axes; a row-major one without gaps is among them."""

    def each(options):
        return st.tuples(*[st.sampled_from(options)] * rank)

    return st.builds(
        Layout,
        order=st.permutations(range(rank)).map(tuple),
        spacings=each([(1, 0), (1, 0), (1, 1), (2, 0), (3, 2)]),
        expanded=each([False] * 5 + [may_expand]),
        offset=st.integers(0, 3),
        negated=st.sampled_from([False, False, False, True]),
        poison=st.sampled_from([float("nan"), 1e38]),
    )


def guarded(values: Tensor, layout: Layout) -> Guarded:
    """Lay out ``values``, or the first of them along expanded axes, inside poison."""
    kept = values
    for axis, expanded in enumerate(layout.expanded):
        kept = kept.narrow(axis, 0, min(1, kept.shape[axis])) if expanded else kept
    strides, room = [0] * values.dim(), 1
    for axis in reversed(layout.order):
        step, gap = layout.spacings[axis]
        strides[axis] = step * room
        room *= kept.shape[axis] * step + gap
    storage = values.new_full((2 * GUARD + layout.offset + room,), layout.poison)
    view = storage.as_strided(kept.shape, strides, GUARD + layout.offset)
    view.copy_(-kept if layout.negated else kept)
    tensor = torch._neg_view(view) if layout.negated else view
    return Guarded(tensor.expand(values.shape), storage, storage.clone())
