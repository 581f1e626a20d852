"""What an operation costs: a vector, of which every published unit is a view."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from operator import attrgetter

from ...errors import ArgumentError, nearest


@dataclass(frozen=True)
class Cost:
    """Whole numbers for one call.

    Attributes:
        macs: multiply-accumulates of contractions (matrix products, convolutions, attention products).
        elementwise: everything else that computes, in operations (weights in ``op_costs``).
        normalization: what fvcore adds to the contractions: 5 an element of layer norm, 2 of batch norm, 1 of the input
            of an adaptive pooling or an interpolation.
        bytes_read, bytes_written: of operands and results, each once; a view moves nothing.
        saved: bytes that stay for the backward pass, parameters excluded.
        attention_map: elements of softmax inputs; a fused kernel does not store them.
    """

    macs: int = 0
    elementwise: int = 0
    normalization: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    saved: int = 0
    attention_map: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


_vector = attrgetter(*(field.name for field in fields(Cost)))


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of many."""
    return Cost(*map(sum, zip(*map(_vector, costs), strict=True)))


CONVENTIONS: dict[str, Callable[[Cost], int]] = {
    "mac": lambda cost: cost.macs,
    "flop": lambda cost: 2 * cost.macs,
    "fvcore": lambda cost: cost.macs + cost.normalization,
}
"""``mac``: contractions, one multiply-accumulate each, as the papers of these families count. ``flop``: two each.
``fvcore``: multiply-accumulates plus fvcore's price of normalization and pooling."""

UNITS = {"mac": "MAC", "flop": "FLOP", "fvcore": "MAC (fvcore)"}


def counted(cost: Cost, convention: str) -> int:
    return CONVENTIONS[convention](cost)


def require_convention(name: str) -> str:
    """Raises:
    ArgumentError: unknown convention.
    """
    if name not in CONVENTIONS:
        raise ArgumentError(
            f"convention: unknown, got {name!r}{nearest(str(name), CONVENTIONS)}; use one of {', '.join(CONVENTIONS)}"
        )
    return name
