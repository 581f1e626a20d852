"""What a conversion did, or would do: one row per site, and the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConversionError, nearest
from ..ir.contract import Exactness, exactness_of
from ..numerics.unbounded import spelled_out
from .names import folded_name, folded_names, numberless
from .numbers import error_text, short
from .page import page
from .tables import markdown_table

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class SiteErrors:
    """A site converted alone, on real images: relative errors of its branch, of the residual stream after it and of
    the outputs, and the share of images with the same largest output. None: not measured."""

    local: float | None = None
    stream: float | None = None
    logits: float | None = None
    agreement: float | None = None

    @property
    def dead(self) -> bool:
        """The site changed and the outputs did not, beyond rounding: nothing reads it."""
        return self.logits is not None and self.local is not None and self.logits <= 1e-6 and self.local >= 1e-3


@dataclass(frozen=True)
class ModelErrors:
    """A model against its original: relative error of the outputs, share of the ``images`` with the same largest one
    (None: the outputs are no classes)."""

    logits: float
    agreement: float | None
    images: int

    def __str__(self) -> str:
        share = "" if self.agreement is None else f", agreement {self.agreement:.1%}"
        return f"error {error_text(self.logits)}{share}"


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did: its settings, the model on held-out images ``before`` and ``after``, what was done by
    site. ``reverted``: taken back, as held-out images showed no improvement. ``floor``: the same training of an exact
    copy.
    """

    settings: dict[str, Any]
    before: ModelErrors
    after: ModelErrors
    sites: dict[str, str] = field(default_factory=dict)
    reverted: bool = False
    floor: ModelErrors | None = None

    def __str__(self) -> str:
        held = f"on {self.after.images} held-out images"
        text = f"calibrated by {self.settings['method']}: {self.before} -> {self.after} {held}"
        text += "; reverted: no improvement on held-out images" if self.reverted else ""
        return text + (f"; the same training of an exact copy: {self.floor}" if self.floor else "")


@dataclass(frozen=True)
class SiteReport:
    """One site. ``status`` is converted, kept, refused or untouched; ``why`` is one clause.

    ``certificate`` is the text of the proof that the site was read right; ``grid`` the map for which the class
    holds; ``parameters`` how many were ``moved`` (they serve as before), are ``new`` or were ``dropped``; ``macs``
    the multiply-adds of its two products before and after, on the example input; ``error`` the measured local error
    of the new core on the example input (None: not measured); ``dropped_mass`` the share of attention per head that
    is lost, both at the queries that the certificate names, where it names a part of them. ``read`` says which of its
    tokens can reach an output of the captured call: "all", the "prefix" tokens alone, or "none"; ``dead`` that its
    conversion can change no output, for what it changes is not read.
    """

    name: str
    kind: str
    source: str
    status: str
    target: str = ""
    exactness: str = ""
    why: str = ""
    certificate: str = ""
    benefit: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    grid: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    macs: tuple[int, int] | None = None
    error: float | None = None
    dropped_mass: list[float] | None = None
    errors: SiteErrors | None = None
    calibrated: SiteErrors | None = None
    read: str = "all"
    dead: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """All sites of a model, and what the conversion did to its output (None: not measured).

    ``errors`` are the model's on real images, ``floor`` those of the same sites rewritten to what they were.
    """

    model: str
    input_shapes: list[list[int]]
    sites: list[SiteReport]
    output_error: float | None = None
    fixed_to: list[str] = field(default_factory=list)
    new_parameters: list[str] = field(default_factory=list)
    errors: ModelErrors | None = None
    floor: ModelErrors | None = None
    calibration: CalibrationReport | None = None

    @property
    def converted(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "converted"]

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """JSON with a schema version; unmeasured errors are null, and one that is no number is "nan"."""
        return json.dumps(spelled_out(self.to_dict()), indent=2, default=str, allow_nan=False)

    def to_markdown(self) -> str:
        columns, rows = self.cells()
        return "\n".join([f"**{self.headline()}**", "", *markdown_table(columns, rows)])

    def to_html(self) -> str:
        """One self-contained page."""
        title, (columns, rows) = self.headline(), self.cells()
        return page("conversion.html", title, headline=title, columns=columns, rows=rows, notes=self.notes())

    def raise_if(
        self, *, max_output_error: float | None = None, below: str | None = None, refused: bool = False
    ) -> None:
        """Stop where a conversion came out worse than it may.

        Args:
            max_output_error: largest relative error of the output on the example input; one that was not measured is
                too large.
            below: no converted site may be of a class below this one ("exact", "continuous", "projected").
            refused: whether a refused site is a reason too.

        Raises:
            ArgumentError: ``below`` is no class.
            ConversionError: with every site or figure that is out of bounds.
        """
        problems = []
        error = math.inf if self.output_error is None else self.output_error
        if max_output_error is not None and not error <= max_output_error:
            problems.append(f"output error {error_text(self.output_error)} is above {max_output_error:.1e}")
        if below is not None:
            least = exactness_of(below, "below")
            problems += [f"{s.name}: {s.exactness}, {s.why}" for s in self.converted if Exactness[s.exactness] < least]
        if refused:
            problems += [f"{s.name}: refused, {s.why}" for s in self.sites if s.status == "refused"]
        if problems:
            raise ConversionError(f"the conversion of {self.model} exceeds its bounds:\n  " + "\n  ".join(problems))

    def headline(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        error = f"; output error {error_text(self.output_error)}" if self.converted else ""
        return f"{self.model} at {shapes}: {len(self.converted)} of {len(self.sites)} sites converted{error}"

    def table(self) -> Table:
        table = Table(title=self.headline(), title_justify="left", box=None, header_style="bold")
        columns, rows = self.cells()
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column in ("site", "status", "class"))
        for row in rows:
            table.add_row(*row)
        return table

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table's columns and rows, without columns that say nothing."""
        rows = [_cells(names, site) for names, site in folded(self.sites)]
        told = [any(row[place] not in ("", error_text(None)) for row in rows) for place in range(len(_COLUMNS))]
        shown = [place for place, name in enumerate(_COLUMNS) if told[place] or name == "error"]
        return [_COLUMNS[place] for place in shown], [[row[place] for place in shown] for row in rows]

    def __str__(self) -> str:
        console = Console(width=160, record=True, file=None, quiet=False, force_terminal=False)
        with console.capture() as captured:
            console.print(self.table(), markup=False)
            for note in self.notes():
                console.print(note, markup=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def notes(self) -> list[str]:
        notes = []
        if self.errors is not None:
            floor = f"; the same sites rewritten to what they were: {self.floor}" if self.floor else ""
            notes.append(f"on {self.errors.images} images: {self.errors}{floor}")
        if self.calibration is not None:
            notes.append(str(self.calibration))
        dead = sum(site.dead for site in self.sites)
        if dead:
            notes.append(f"{dead} DEAD: no output of the captured call reads what is converted there")
        if self.fixed_to:
            notes.append(f"tied to this input size: {', '.join(folded_names(self.fixed_to))}")
        if self.new_parameters:
            notes.append(f"new parameters, not in an optimizer made before: {', '.join(self.new_parameters)}")
        return notes


_COLUMNS = (
    "site", "status", "class", "source", "moved/new/dropped", "product MACs", "error", "attention mass kept",
    "only this", "why",
)  # fmt: skip


def folded(sites: list[SiteReport]) -> Iterator[tuple[str, SiteReport]]:
    """Consecutive sites that differ only in numbers of their names share a row: ``blocks.{0...11}.attn``."""

    def alike(site: SiteReport) -> tuple[Any, ...]:
        return (numberless(site.name), site.status, _class(site), site.source, site.target, site.why)

    for _, group in groupby(sites, key=alike):
        members = list(group)
        worst = max(members, key=lambda site: (_badness(_only(site)), _badness(site.error)))
        yield folded_name([site.name for site in members]), worst


def _badness(error: float | None) -> tuple[int, float]:
    """A row shows its worst member: no number, then not measured, then the largest error."""
    if error is None:
        return 1, 0.0
    return (2, 0.0) if error != error else (0, error)


def _cells(names: str, site: SiteReport) -> tuple[str, ...]:
    kept = ""
    if site.dropped_mass:
        kept = f"{1 - sum(site.dropped_mass) / len(site.dropped_mass):.2f}"
    error = error_text(site.error) if site.status == "converted" else ""
    macs = " -> ".join(map(short, site.macs)) if site.macs else ""
    counts = "/".join(short(site.parameters[key]) for key in ("moved", "new", "dropped")) if site.parameters else ""
    return (
        names, site.status, _class(site), site.source, counts, macs, error, kept, _only_text(site), site.why,
    )  # fmt: skip


def _class(site: SiteReport) -> str:
    return " ".join(filter(None, [site.exactness, "DEAD" if site.dead else ""]))


def _only(site: SiteReport) -> float | None:
    return None if site.errors is None else site.errors.logits


def _only_text(site: SiteReport) -> str:
    """The error of the outputs with this site converted alone, before and after calibration."""
    if site.status != "converted":
        return ""
    if site.dead or (site.errors is not None and site.errors.dead):
        return "DEAD"
    if site.errors is None:
        return error_text(None)
    after = "" if site.calibrated is None else f" -> {error_text(site.calibrated.logits)}"
    return error_text(site.errors.logits) + after


def suggestion(wanted: str, names: list[str]) -> str:
    """A suggestion for a name that is not known, or the names there are."""
    if close := nearest(wanted, names):
        return close
    return f"; there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "; there are none"
