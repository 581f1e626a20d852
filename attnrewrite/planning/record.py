"""What a conversion did, as data: written as JSON, read again, and done again to another model of the architecture.

A record holds decisions, no weights: which site became what, under which options. Weights are the ``state_dict()``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal

import torch

from ..capture.module_call import class_name
from ..errors import ArgumentError, first_line, nearest
from ..ir.contract import Target
from ..numerics.unbounded import spelled_out
from ..version import __version__
from .decoding import decoded, is_plain
from .registry import known_targets

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RecordedTarget:
    """A target by its ``name`` and ``options``; ``defined_in`` is its class. ``opaque`` are options that are no plain
    values, such as tensors, which a record does not hold."""

    name: str
    defined_in: str
    options: dict[str, Any]
    opaque: tuple[str, ...]

    @classmethod
    def of(cls, target: Target) -> RecordedTarget:
        options = _options(target)
        plain = {name: _frozen(value) for name, value in options.items() if is_plain(value)}
        return cls(target.name, class_name(type(target)), plain, tuple(name for name in options if name not in plain))

    def make(self, place: str) -> Target:
        """The target; messages begin with ``place``.

        Raises:
            ArgumentError: it is not known here, is another one, or takes other options.
        """
        known = known_targets()
        if self.name not in known:
            raise ArgumentError(
                f"{place}: unknown target {self.name!r}{nearest(self.name, known)}; install the package that brings "
                f"{self.defined_in}"
            )
        kind = known[self.name]
        if class_name(kind) != self.defined_in:
            raise ArgumentError(
                f"{place}: target {self.name!r} is {class_name(kind)} here, and was {self.defined_in}; install the "
                "package that brings that"
            )
        if self.opaque:
            raise ArgumentError(
                f"{place}: {', '.join(self.opaque)} of target {self.name!r} cannot be written down; convert with the "
                "target object instead"
            )
        try:
            return kind(**self.options)
        except (TypeError, ArgumentError) as cause:
            raise ArgumentError(
                f"{place}: target {self.name!r} does not take {self.options} here: {first_line(cause)}; install the "
                "version that the record was made with"
            ) from cause


@dataclass(frozen=True)
class RecordedConversion:
    """What a site became: the ``index``-th of those that ``target`` converted, in which class, and why. ``error`` is
    the measured local error on the example input (None: not measured)."""

    target: RecordedTarget
    index: int
    exactness: Literal["EXACT", "CONTINUOUS", "PROJECTED", "FRESH"]
    why: str
    error: float | None


@dataclass(frozen=True)
class RecordedSite:
    """One site: the module that it is in, its kind, what it is (``source``), and what became of it."""

    name: str
    kind: str
    source: str
    status: Literal["converted", "kept", "refused", "untouched"]
    why: str
    conversion: RecordedConversion | None

    def __post_init__(self) -> None:
        if (self.status == "converted") != (self.conversion is not None):
            raise ArgumentError(
                f"conversion: a site that is {self.status} has {'none' if self.conversion is None else 'one'}; write "
                "the document with to_json"
            )


@dataclass(frozen=True)
class Record:
    """A conversion as it was asked for (``to``, targets by globs of sites, and ``fidelity``), the ``inputs`` by the
    names of forward's arguments with their shapes, and every site with what became of it.

    ``tied_sizes`` are modules that hold for the captured sizes alone, with the reasons; ``kept_values`` by module the
    attributes that are no longer set; ``versions`` those of the libraries. ``earlier`` is the record of a conversion
    that the model had gone through before.
    """

    model: str
    to: dict[str, RecordedTarget]
    fidelity: Literal["exact", "continuous", "projected", "fresh"]
    inputs: dict[str, tuple[int, ...]]
    sites: tuple[RecordedSite, ...]
    tied_sizes: tuple[str, ...]
    kept_values: dict[str, tuple[str, ...]]
    output_error: float | None
    versions: dict[str, str]
    earlier: Record | None

    def to_json(self) -> str:
        """JSON with a schema version. An error that is no number is ``"nan"``, one not measured null."""
        document = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(spelled_out(document), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that ``to_json`` wrote.

        Raises:
            ArgumentError: no JSON, another schema version, or a field that is missing, unknown or of another type; the
                message begins with the field.
        """
        try:
            document = json.loads(text)
        except (TypeError, ValueError, RecursionError) as cause:
            raise ArgumentError(f"record: is no JSON ({first_line(cause)}); write it with to_json") from cause
        if not isinstance(document, dict):
            raise ArgumentError("record: expected an object; write it with to_json")
        version = document.pop("schema_version", None)
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ArgumentError(
                f"record.schema_version: this version of attnrewrite ({__version__}) reads {SCHEMA_VERSION}, got "
                f"{version!r}; install the version that wrote it, which it names under versions"
            )
        record: Record = decoded(cls, document, "record")
        return record


def versions() -> dict[str, str]:
    """Of what a conversion depends on."""
    return {"attnrewrite": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _options(target: Target) -> Mapping[str, Any]:
    """What the target was made with; of one that is no dataclass, what it holds."""
    if not is_dataclass(target):
        return vars(target)
    return {field.name: getattr(target, field.name) for field in fields(target) if field.init}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
