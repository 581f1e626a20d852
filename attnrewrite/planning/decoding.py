"""Read dataclasses from the values of a JSON document, by the types of their fields; what does not fit is named."""

from __future__ import annotations

import math
import reprlib
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ArgumentError, nearest
from ..numerics.unbounded import UNBOUNDED


def decoded(kind: Any, value: Any, place: str) -> Any:
    """``value`` as the type ``kind`` has it: a dataclass, ``dict[str, X]``, ``tuple[X, ...]``, ``X | None``, a
    ``Literal``, ``str``, ``int``, ``float``, or ``Any`` for numbers, words, truths and tuples of them.

    Raises:
        ArgumentError: something else stands there; the message begins with its ``place``, such as ``record.sites[3]``.
    """
    origin = get_origin(kind)
    if origin is UnionType:
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        return None if value is None else decoded(inner, value, place)
    if origin is Literal:
        return value if value in get_args(kind) else _refuse(place, f"one of {', '.join(get_args(kind))}", value)
    if origin is tuple:
        return _each(get_args(kind)[0], value, place)
    if origin is dict:
        _require(isinstance(value, dict), place, "an object", value)
        return {key: decoded(get_args(kind)[1], each, f"{place}.{key}") for key, each in value.items()}
    if kind is Any:
        return _plain(value, place)
    return _object(kind, value, place) if is_dataclass(kind) else _scalar(kind, value, place)


def is_plain(value: Any) -> bool:
    """Whether ``decoded`` gives it back as it was, once lists are tuples."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return type(value) in (NoneType, bool, int, str) or (type(value) is float and math.isfinite(value))


def _object(kind: Any, value: Any, place: str) -> Any:
    _require(isinstance(value, dict), place, "an object", value)
    names = {field.name for field in fields(kind)}
    for name in names - value.keys():
        raise ArgumentError(f"{place}.{name}: is missing; write the document with to_json")
    for name in value.keys() - names:
        raise ArgumentError(f"{place}.{name}: is not known{nearest(name, names)}; write the document with to_json")
    hints = get_type_hints(kind)
    values = {name: decoded(hints[name], value[name], f"{place}.{name}") for name in names}
    try:
        return kind(**values)
    except ArgumentError as cause:
        raise ArgumentError(f"{place}.{cause}") from cause


def _each(kind: Any, value: Any, place: str) -> tuple[Any, ...]:
    _require(isinstance(value, list), place, "a list", value)
    return tuple(decoded(kind, each, f"{place}[{number}]") for number, each in enumerate(value))


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return _each(Any, value, place)
    _require(is_plain(value), place, "a number, a word, true, false, null or a list", value)
    return value


def _scalar(kind: Any, value: Any, place: str) -> Any:
    if kind is float:
        if isinstance(value, str) and value in UNBOUNDED:
            return UNBOUNDED[value]
        _require(type(value) in (int, float) and abs(value) < math.inf, place, "a number", value)
        return float(value)
    _require(type(value) is kind, place, {str: "a word", int: "a whole number"}[kind], value)
    return value


def _require(holds: bool, place: str, expected: str, value: Any) -> None:
    if not holds:
        _refuse(place, expected, value)


def _refuse(place: str, expected: str, value: Any) -> Any:
    raise ArgumentError(f"{place}: expected {expected}, got {reprlib.repr(value)}; write the document with to_json")
