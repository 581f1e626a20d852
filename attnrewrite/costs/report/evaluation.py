"""The formulas of a model at one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import ArgumentError, nearest
from ..count.cost import Cost

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def item_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        ArgumentError: unknown dtype.
    """
    if dtype not in _ITEM_BYTES:
        known = ", ".join(_ITEM_BYTES)
        raise ArgumentError(f"dtype: unknown, got {dtype!r}{nearest(str(dtype), _ITEM_BYTES)}; use one of {known}")
    return _ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Evaluation:
    """The formulas at one size. ``extrapolated``: the model itself was not seen to take this size.

    ``attention_map`` (elements) and ``saved`` (bytes, of the unfused form, sites only) are of the sites.
    ``elementwise``, ``normalization``, ``bytes_read`` and ``bytes_written`` are the model's, from ``Report.work``, that
    is derived when one of them is first asked for. They are None where neither a polynomial nor the model itself
    answers, and bytes for another dtype than the model's.
    """

    height: int
    width: int
    batch: int
    dtype: str
    macs: int
    attention_map: int
    saved: int
    extrapolated: bool
    _work: Callable[[], Cost | None] = field(repr=False, compare=False)
    _own_dtype: bool = field(repr=False, compare=False)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def elementwise(self) -> int | None:
        return None if (cost := self._work()) is None else cost.elementwise

    @property
    def normalization(self) -> int | None:
        return None if (cost := self._work()) is None else cost.normalization

    @property
    def bytes_read(self) -> int | None:
        return None if not self._own_dtype or (cost := self._work()) is None else cost.bytes_read

    @property
    def bytes_written(self) -> int | None:
        return None if not self._own_dtype or (cost := self._work()) is None else cost.bytes_written
