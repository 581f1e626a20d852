"""What a model is made of: its sites with their proofs, and what each could become."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from torch import nn

from ..capture.ambient import plain_modes
from ..errors import NothingToDo, Refusal
from ..graph.dataflow import Dataflow
from ..ir.contract import Exactness, Target
from ..ir.sites import AttentionSite, Site
from ..numerics.draws import Stream
from ..planning.plan import Plan
from ..planning.product_cost import macs_after, macs_before
from ..planning.reading import TOLD
from ..planning.registry import known_targets
from ..planning.stages import lifted, prove
from ..reports.names import folded_name, numberless
from ..reports.numbers import short
from ..reports.tables import aligned

EFFECTS = {
    Exactness.EXACT: "same function",
    Exactness.CONTINUOUS: "same function at first",
    Exactness.PROJECTED: "close: calibrate it",
    Exactness.FRESH: "new: train it",
}

_NAMES = {
    "attention": ("attention", "attentions"),
    "mlp": ("MLP", "MLPs"),
    "stem": ("stem or merge", "stems and merges"),
}

Member = TypeVar("Member")

_SHOWN = 7
"""Targets that the summary has a line for."""


@dataclass(frozen=True)
class Option:
    """What one site could become: the class, None if it cannot be that, or ``stays`` as it is, and why; ``macs`` are
    those of its two products before and after, where they can be counted."""

    target: str
    exactness: Exactness | None
    why: str
    stays: bool = False
    macs: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.stays:
            return "leaves it as it is"
        return f"{'refused' if self.exactness is None else self.exactness.name}: {self.why}"


@dataclass(frozen=True)
class Explanation:
    """The site IR of a model, and for every site its ``options``. ``str`` begins with a summary; then come the sites,
    those that are alike together, each with its certificate and what it could become, to the width of the terminal.
    """

    plan: Plan
    options: list[list[Option]]

    def __str__(self) -> str:
        width = Console().width
        summary = [part for text in self.summary() for part in _wrapped(text, width, "    ")]
        return "\n".join([*summary, "", *self.details()]).rstrip()

    def summary(self) -> list[str]:
        """What was found, what each target would do, and what to call next: ten lines or so."""
        sites, refused = self.plan.sites, self.plan.refused
        if not sites and not refused:
            return ["no attention, MLP or stem recognized"]
        kinds = [planned.site.kind for planned in sites]
        counts = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
        found = ", ".join(f"{count} {_NAMES[kind][count > 1]}" for count, kind in counts) or "nothing that can be read"
        unproved = sum(planned.status == "refused" for planned in sites)
        found += "" if not sites else f"; {unproved} not proved" if unproved else ", all proved"
        found += f"; {len(refused)} more could not be read" if refused else ""
        lines = [f"{self.plan.report().headline().partition(': ')[0]}: {found}"]
        choices = self._choices()
        plain = [choice for choice in choices if not choice.recipe]
        if plain:
            head = ("to", "sites", "the model becomes", "its products cost")
            lines += [f"  {line}" for line in aligned(head, [choice.cells() for choice in plain[:_SHOWN]])]
        others = [choice.target for choice in (*plain[_SHOWN:], *(choice for choice in choices if choice.recipe))]
        lines += [f"  also: {', '.join(others)}"] if others else []
        if not choices:
            reasons = [each.reason for each in refused]
            reasons += [option.why for options in self.options for option in options if not option.stays]
            alike = _grouped(reasons, numberless).values()
            return [*lines, *(f"  nothing to convert: {reason}" for reason, *_ in list(alike)[:3])]
        best = (plain or choices)[0]
        call = f'attnrewrite.convert(model, to="{best.target}"{"" if best.exact else ", calibrate=images"})'
        return [*lines, f"next: converted = {call}; attnrewrite.report(converted) says what was done"]

    def details(self) -> list[str]:
        """The sites, folded: those that differ in numbers alone share an entry."""
        width = Console().width
        lines: list[str] = []
        for places in _grouped(range(len(self.options)), self._kind).values():
            planned, options = self.plan.sites[places[0]], self.options[places[0]]
            proof = "" if planned.certificate is None else f"   {planned.certificate}"
            told = TOLD[self.plan.read[id(planned.site)]]
            name = folded_name([self.plan.sites[place].site.name for place in places])
            numbers = f"%{places[0]}" + (f" and {len(places) - 1} like it" if len(places) > 1 else "")
            lines += _wrapped(f"{numbers} = {planned.site.describe()} @ {name}{proof}{told}", width, "    ")
            for text, alike in _grouped(options, str).items():
                lines += _wrapped(f"      {', '.join(option.target for option in alike)}: {text}", width, " " * 10)
        for refused in _grouped(self.plan.refused, lambda r: _alike(r.kind, r.reason, r.name)).values():
            name = folded_name([each.name for each in refused])
            lines += _wrapped(f"refused {refused[0].kind} @ {name}: {refused[0].reason}", width, "    ")
        return lines

    def _kind(self, place: int) -> tuple[str, ...]:
        """The same for sites that share an entry."""
        planned = self.plan.sites[place]
        said = (planned.site.describe(), planned.site.name, *map(str, self.options[place]))
        return self.plan.read[id(planned.site)], *_alike(*said)

    def _choices(self) -> list[_Choice]:
        """The targets that convert anything: attention first, the cheaper before the more expensive."""
        by_target = _grouped((option for options in self.options for option in options), lambda option: option.target)
        found = (_Choice(name, options) for name, options in by_target.items())
        return sorted((choice for choice in found if choice.converting), key=lambda choice: choice.order)


class _Choice:
    """One target for the whole model."""

    def __init__(self, target: str, options: list[Option]) -> None:
        self.target, self.options = target, options
        self.kinds = known_targets()[target].kinds
        self.recipe = len(self.kinds) > 1
        self.converting = [option.exactness for option in options if option.exactness is not None]
        macs = [option.macs for option in options if option.macs is not None]
        self.before, self.after = (sum(pair[place] for pair in macs) for place in (0, 1))

    @property
    def exact(self) -> bool:
        return min(self.converting) >= Exactness.CONTINUOUS

    @property
    def order(self) -> tuple[Any, ...]:
        share = self.after / self.before if self.before else 1.0
        return list(_NAMES).index(self.kinds[0]), round(share, 2), -min(self.converting), self.target

    def cells(self) -> tuple[str, str, str, str]:
        saved = f"{short(self.before)} -> {short(self.after)} MACs" if self.before else ""
        count = f"{len(self.converting)} of {len(self.options)}"
        return self.target, count, EFFECTS[min(self.converting)], saved


def _alike(*texts: str) -> tuple[str, ...]:
    """The same for texts that differ only in their numbers."""
    return tuple(map(numberless, texts))


def _grouped(members: Iterable[Member], kind: Callable[[Member], Any]) -> dict[Any, list[Member]]:
    """By kind, in the order in which the kinds come first."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(kind(member), []).append(member)
    return groups


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


@plain_modes()
def explain(model: nn.Module, example_inputs: Any | None = None) -> Explanation:
    """Lift and certify every site of ``model`` and say what each could become, in which class.

    Targets are asked with their default options. The model is not changed.

    Raises:
        ArgumentError: not a module, or example inputs that it does not take.
        CaptureError: the model cannot be exported.
    """
    found = lifted(model, example_inputs)
    made = prove(found, range(len(found.sites)), progress=False)
    counted: dict[Any, Any] = {}
    targets = [kind() for name, kind in sorted(known_targets().items()) if name != "identity"]

    def options(site: Site) -> list[Option]:
        return [_option(site, target, made.flow, counted) for target in targets if site.kind in target.kinds]

    with Stream().drawn_from():
        return Explanation(made, [options(planned.site) for planned in made.sites])


def _option(site: Site, target: Target, flow: Dataflow, counted: dict[Any, Any]) -> Option:
    try:
        conversion = target.convert(site, 0, flow.weights)
    except Refusal as reason:
        return Option(target.name, None, reason.told(site.name), isinstance(reason, NothingToDo))
    macs = None
    if isinstance(site, AttentionSite):
        key = (site.describe(), target.name)
        macs = _once(counted, key, lambda: (macs_before(site), macs_after(site, conversion)))
    complete = macs if macs is not None and macs[1] is not None else None
    return Option(target.name, conversion.exactness, conversion.why, macs=complete)


def _once(known: dict[Any, Any], key: Any, answer: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = answer()
    return known[key]
