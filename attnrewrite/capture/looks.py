"""Other looks at a model: captured again at other image sizes, aspects and batches, and in training mode.

One capture is not the function. What moves between looks comes from the sizes; what does not is a constant.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from .captured_graph import CapturedGraph
from .exported import Capture, capture_call

Sides = tuple[int, int]

_STEP = 32
"""Sides grow by multiples of it: the patches, strides and windows of most models divide it."""

_LARGEST = 512
"""Sides up to which they also grow by multiples of themselves, which divides whatever divided the captured ones."""

_ODD = ((4 * _STEP + 22, 5 * _STEP + 21), (6 * _STEP + 10, 3 * _STEP + 11))
"""What sides grow by to sizes that nothing divides. Patches of 4, 8 and 16 leave remainders that are told from each
other, and numbers of patches that windows of 4, 7 and 8 do not divide, by two or more: padding by one looks like
rounding. On the first such look these numbers are odd for patches of 4 and 16, so that what a forward makes of them by
``%`` is told from what it makes of even ones; on the second, more than a patch is missing to the next multiple of two.
"""

_UNITS = (4, 8, 16)
"""Patches that an image may have to be made of whole: where no odd size is taken, sides grow by multiples of the first
that will do, ``_WHOLE``, which leave other remainders by four, each, than the captured ones."""

_WHOLE = ((5, 7), (14, 10))

_BATCHES = (4, 6, 3)
"""What the batch grows by, look by look: odd and even, for a forward may make halves of ``len(x)`` without a trace."""

_BATCHES_ALONE = (1, 2)
"""The same where the size stays: two, for a number may be alike on any two. Larger ones would tell more and take more
memory: reading a look computes an address for every element of every sample."""


def other_looks(first: Capture) -> list[Capture]:
    """Captures at other sizes, each of another aspect and batch: one that has the divisors of the captured sides, and
    two that as little divides as the model takes, or one that is as the first; none where it takes no other size.
    """
    batch, sides = first.batch, image_sides(first)
    if sides is None:
        return []
    for step in (_STEP, *([max(sides)] if max(sides) <= _LARGEST else [])):
        grown = _look(first, _grown(sides, step, 1, 3), batch + _BATCHES[0])
        if grown is not None:
            return [grown, *_uneven_looks(first, sides, step)]
    return []


def _uneven_looks(first: Capture, sides: Sides, step: int) -> list[Capture]:
    """Two looks at sizes that as little divides as the model takes, or one that has all divisors again."""
    whole = [tuple((unit * rows, unit * columns) for rows, columns in _WHOLE) for unit in _UNITS]
    for one, other in (_ODD, *whole):
        uneven = _look(first, _added(sides, one), first.batch + _BATCHES[1])
        if uneven is not None:
            last = _look(first, _added(sides, other), first.batch + _BATCHES[2])
            return [uneven] if last is None else [uneven, last]
    last = _look(first, _grown(sides, step, 4, 2), first.batch + _BATCHES[2])
    return [] if last is None else [last]


def further_looks(first: Capture) -> list[Capture]:
    """Captures with one side grown beyond the other, each in turn, and with both halved: what a forward decides for
    each side by itself, and what it may do below some size."""
    sides = image_sides(first)
    if sides is None:
        return []
    others = [(sides[0], 2 * sides[1]), (2 * sides[0], sides[1]), (sides[0] // 2, sides[1] // 2)]
    return [look for size in others if (look := _look(first, size, first.batch + 2)) is not None]


def same_size_looks(first: Capture) -> list[Capture]:
    """The captured size with other batches; none if the model takes no other."""
    sides = image_sides(first)
    return [look for more in _BATCHES_ALONE if (look := _look(first, sides, first.batch + more)) is not None]


def training_look(first: Capture, look: CapturedGraph) -> Capture | None:
    """What ``look`` shows, the ``first`` or another, in training mode; None if it cannot be traced, as where chance
    decides what is computed."""
    return _look(first, image_sides(look), look.batch, training=True)


def image_sides(look: CapturedGraph) -> Sides | None:
    """Height and width of the first image ``[batch, ..., height, width]`` that the model is given."""
    image = next((look.tensors[node] for node in look.inputs if is_image(look.tensors[node])), None)
    return None if image is None else (int(image.shape[-2]), int(image.shape[-1]))


def is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 4 and value.is_floating_point()


def _grown(sides: Sides, step: int, rows: int, columns: int) -> Sides:
    return _added(sides, (rows * step, columns * step))


def _added(sides: Sides, more: Sides) -> Sides:
    return sides[0] + more[0], sides[1] + more[1]


def _look(first: Capture, sides: Sides | None, batch: int, training: bool = False) -> Capture | None:
    """None if the model takes no such input."""
    if sides is not None and min(sides) < 1:
        return None
    inputs = tree_map(lambda leaf: _resized(leaf, first, sides, batch), first.example)
    try:
        with _unlogged():
            return capture_call(first.model, inputs, training)
    except Exception:  # whatever a model says to a size that it does not take
        return None


@contextmanager
def _unlogged() -> Iterator[None]:
    """What torch logs, in this thread, of a size that a model does not take is no error of anybody's."""
    thread, logger = threading.get_ident(), logging.getLogger("torch._subclasses.fake_tensor")

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


def _resized(leaf: Any, first: Capture, sides: Sides | None, batch: int) -> Any:
    """An input of the same kind: of as many samples, and where it is an image of the captured sides, of these."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape = list(leaf.shape)
    if shape and shape[0] == first.batch:
        shape[0] = batch
    if sides is not None and is_image(leaf) and tuple(shape[-2:]) == image_sides(first):
        shape[-2:] = sides
    if shape == list(leaf.shape):
        return leaf
    return leaf.new_empty(shape)  # it is traced by its shape alone, and so takes no memory
