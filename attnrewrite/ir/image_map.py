"""How the map of a site follows the image: its sides on every look, and the image that a model was given last.

A sequence of tokens does not tell a 4 x 16 map from an 8 x 8 one; the image does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

Sides = tuple[int, int]
Law = tuple[int, int]
"""``(stride, offset)``: a side of ``s`` pixels makes ``(s + offset) // stride`` tokens."""

_REMEMBERED = 64
"""Sizes of images that a backward pass may come back to."""


class ImageSize:
    """Height and width of the image that a model was given last; one for each converted model and its copies.

    Every thread has its own, for one model may serve several. A compiler traces one thread, and reads and writes
    ``last``.
    """

    def __init__(self) -> None:
        self.last: Sides | None = None
        self._local = threading.local()

    def note(self, sides: Sides) -> None:
        self.last = sides
        if torch.compiler.is_compiling():
            return
        self._local.now = sides
        if torch.is_grad_enabled():  # else no backward pass comes back to it
            recent = [other for other in self._recent() if other != sides]
            self._local.recent = [sides, *recent][:_REMEMBERED]

    def forget(self) -> None:
        """As if this thread had seen no image."""
        self.last = None
        self._local = threading.local()

    def possible(self) -> list[Sides]:
        """The image that the running forward was given. In a backward pass, where checkpointed blocks run again for
        images that came before, all that were given lately."""
        if torch.compiler.is_compiling():
            return [] if self.last is None else [self.last]
        if torch._C._current_graph_task_id() != -1:  # a backward pass may have threads of its own, which saw no image
            return self._recent() or ([] if self.last is None else [self.last])
        now = getattr(self._local, "now", None)
        return [] if now is None else [now]

    def _recent(self) -> list[Sides]:
        return getattr(self._local, "recent", [])

    def __deepcopy__(self, memo: Any) -> ImageSize:
        return self  # the cores of one model, copied one by one, look at the same image

    def __reduce__(self) -> Any:
        return ImageSize, ()


@dataclass(frozen=True)
class ImageMap:
    """The sides of one map beside those of the image, look by look, the first capture first."""

    size: ImageSize = field(repr=False)
    images: tuple[Sides, ...]
    maps: tuple[Sides, ...]

    @cached_property
    def laws(self) -> tuple[list[Law], list[Law]]:
        """Of both axes, every law that explains all looks."""
        rows, columns = (
            laws_of([(image[axis], sides[axis]) for image, sides in zip(self.images, self.maps, strict=True)])
            for axis in (0, 1)
        )
        return rows, columns

    def possible(self, tokens: int) -> set[Sides] | None:
        """The maps of so many tokens that the image may have; None if no image was seen, or no law explains the map."""
        rows, columns = self.laws
        images = self.size.possible()
        if not images or not rows or not columns:
            return None
        return {sides for image in images for sides in _sides(image, rows, columns) if sides[0] * sides[1] == tokens}


def _sides(image: Sides, rows: list[Law], columns: list[Law]) -> Iterable[Sides]:
    """Under one law for both axes where there is one, else under any two."""
    both = [law for law in rows if law in columns]
    pairs = [(law, law) for law in both] if both else [(row, column) for row in rows for column in columns]
    return {tuple(_tokens(side, law) for side, law in zip(image, pair, strict=True)) for pair in pairs}  # type: ignore[misc]  # two


def _tokens(side: int, law: Law) -> int:
    stride, offset = law
    return (side + offset) // stride


def laws_of(pairs: list[tuple[int, int]]) -> list[Law]:
    """Every law that explains all ``pairs`` of a side of the image and of the map.

    Of several strides those count that divide most of the images: whichever is meant, a map that has not as many tokens
    as the sequence is not taken for its map. What divides others but not the first is none: the next image has all
    divisors of the first, so a stride that divides it alone fits by accident, as 6 does where two thirds of the rows of
    patches of 4 are kept.
    """
    if len({side for side, _ in pairs}) < 2:
        return []
    (side, tokens), *_ = pairs
    strides = range(max(1, side // (tokens + 1)), side // max(tokens - 1, 1) + 1)
    laws = [(stride, offset) for stride in strides for offset in range(1 - stride, stride)]
    laws = [law for law in laws if all(_tokens(side, law) == tokens for side, tokens in pairs)]
    exact = {stride: sum(stride * tokens == side for side, tokens in pairs) for stride, _ in laws}
    most = max(exact.values(), default=0)
    return [law for law in laws if exact[law[0]] == most and (not most or law[0] * tokens == side)]
