"""Terms of sizes as tuples with one entry for every look at a model: None for a look that did not come to it."""

from __future__ import annotations

from typing import Any

from ..capture.size_terms import Arithmetic, Side, Term
from .size_forms import Vector


def told_apart(candidates: tuple[set[Term | None], ...]) -> tuple[Term | None, ...] | None:
    """Of the terms that a number may be on every look, those that are computed in one way; None if it is none."""
    if all(each == {None} for each in candidates):
        return None
    if all(len(each) == 1 for each in candidates):
        return tuple(next(iter(each)) for each in candidates)
    ways = [{way_of(term): term for term in each if term is not None} for each in candidates]
    common = set(ways[0]).intersection(*ways[1:])
    return tuple(each[next(iter(common))] for each in ways) if len(common) == 1 else ()


def same_way(operands: tuple[tuple[Any, ...] | None, ...]) -> bool:
    """Whether the operands of a decision were computed on every look, and in the same way."""
    return None not in operands and all(len(set(map(way_of, terms))) == 1 for terms in zip(*operands, strict=True))


def operands_of(terms: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Of arithmetic, look by look, its operands, look by look."""
    count = len(next(term for term in terms if term is not None).operands)
    return [tuple(None if term is None else term.operands[place] for term in terms) for place in range(count)]


def value_of(term: Any) -> Any:
    if isinstance(term, Side):
        return term.extent
    return term.function(*map(value_of, term.operands)) if isinstance(term, Arithmetic) else term


def kind_of(term: Any) -> Any:
    """What a term is, whatever its operands."""
    return term.function if isinstance(term, Arithmetic) else type(term)


def way_of(term: Any) -> Any:
    """How a term is computed, whatever it is computed from."""
    if isinstance(term, Arithmetic):
        return term.function, *map(way_of, term.operands)
    return term.axis if isinstance(term, Side) else None


def first_known(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not None), None)


def agree(extents: Vector, vector: Vector) -> bool:
    return all(one == other for one, other in zip(extents, vector, strict=True) if other is not None)
