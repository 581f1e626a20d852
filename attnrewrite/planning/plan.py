"""A plan: which sites become what, as data. ``apply`` matches nothing and decides nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..capture import Capture
from ..capture.ambient import plain_modes
from ..capture.replica import independent
from ..certify.certificate import relative_error
from ..errors import UNFORESEEN, ArgumentError, AttnRewriteError, ConversionError, ConversionWarning, first_line
from ..graph.dataflow import Dataflow
from ..graph.values import Values
from ..ir.contract import Exactness, Target
from ..ir.sites import AttentionSite, Refused, line
from ..lift.looks import Looks
from ..reports.conversion import ConversionReport, SiteReport, suggestion
from ..rewrite.image_sides import forget_images, note_images
from ..rewrite.owners import OwnerProgram, build_programs
from ..rewrite.rewritten import restore_module
from ..rewrite.saved_state import forget_loading, watch_loading
from .donor import Donor, outputs_of
from .places import Place, find_places
from .planned_site import PlannedSite
from .reading import TOLD, read_tokens
from .record import Record, RecordedConversion, RecordedSite, RecordedTarget, versions
from .site_report import site_report, status_of

END_TO_END = {torch.float64: 1e-6, torch.float32: 1e-3}
"""What an exact conversion may move the output by; half precision: 5e-2. Certification is far stricter;
models that cast to float32 inside move by 1e-7 in float64."""


ATTRIBUTES = ("attnrewrite_report", "attnrewrite_places", "attnrewrite_record")
"""Of a converted model."""

_OF_ROUNDING = 8
"""How many times the rounding of its original an exact conversion may differ by: it rounds as often, elsewhere."""

_BISECT = "bisect with max_rewrites=, then exclude the site with keep="

_TELLING = 0.1
"""An error that is larger says nothing any more, whatever the original rounds."""


@dataclass(frozen=True)
class Wish:
    """What was asked for: targets by globs of sites' names, the first match winning, and the least class accepted."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    fidelity: Exactness = Exactness.PROJECTED


@dataclass(frozen=True)
class Plan:
    """What ``apply`` will do to the donor's model. ``print`` shows it; ``drop`` and ``limit`` give edited plans.

    ``refused`` are places that looked like sites and could not be lifted; ``programs`` the new forwards of modules;
    ``values`` what the example input gave; ``keeps`` by the path of a rewritten module the attributes that its own
    forward sets for others to read, and the new one does not.
    """

    donor: Donor
    sites: tuple[PlannedSite, ...]
    refused: tuple[Refused, ...]
    wish: Wish = Wish()
    programs: tuple[OwnerProgram, ...] = ()
    values: Values = field(repr=False, default_factory=dict)
    keeps: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.donor.model

    @property
    def flow(self) -> Dataflow:
        return self.donor.flow

    @property
    def capture(self) -> Capture:
        return self.donor.capture

    @property
    def looks(self) -> Looks:
        assert self.donor.looks is not None, "a plan is built after other looks at the model"
        return self.donor.looks

    @property
    def converting(self) -> list[PlannedSite]:
        return [planned for planned in self.sites if planned.converting]

    @cached_property
    def read(self) -> dict[int, str]:
        """By ``id`` of a site: which of its tokens reach an output, as ``read_tokens`` says."""
        sites = [planned.site for planned in self.sites]
        return dict(zip(map(id, sites), read_tokens(self.flow, sites), strict=True))

    @property
    def places(self) -> list[Place]:
        """Where what is planned can be calibrated, once it is done."""
        return find_places(self.model, self.flow, self.sites, self.programs)

    def drop(self, *globs: str) -> Plan:
        """The plan without the sites of these names."""
        dropped = {id(planned.site) for glob in globs for planned in matching(glob, self.sites, "drop")}
        return self.keeping(dict.fromkeys(dropped, "dropped from the plan"))

    def limit(self, max_rewrites: int) -> Plan:
        """The plan with its first ``max_rewrites`` conversions only: a wrong result can be bisected to the guilty one.
        """
        if type(max_rewrites) is not int:
            raise ArgumentError(f"max_rewrites: expected a number, got {max_rewrites!r}")
        if max_rewrites < 0:
            raise ArgumentError(f"max_rewrites: must not be negative, got {max_rewrites}")
        beyond = [id(planned.site) for planned in self.converting[max_rewrites:]]
        return self.keeping(dict.fromkeys(beyond, f"max_rewrites={max_rewrites}"))

    def keeping(self, reasons: Mapping[int, str]) -> Plan:
        """The plan without the conversions of the sites that have a reason, by their ``id``."""
        sites = tuple(
            planned.kept(reasons[id(planned.site)]) if planned.converting and id(planned.site) in reasons else planned
            for planned in self.sites
        )
        return replace(self, sites=sites).build()

    def build(self) -> Plan:
        """The plan with the programs of the sites that are to be converted; those that cannot be rewritten are refused.
        """
        conversions = {id(p.site): p.conversion for p in self.converting if p.conversion is not None}
        sites = [planned.site for planned in self.converting]
        programs, failed = build_programs(self.capture, sites, self.looks, lambda site: conversions[id(site)])
        reasons = {id(site): reason for site, reason in failed}
        planned = tuple(p.refused(reasons[id(p.site)]) if id(p.site) in reasons else p for p in self.sites)
        return replace(self, sites=planned, programs=tuple(programs))

    def apply(self, inplace: bool = False) -> nn.Module:
        """The converted model: a copy, or with ``inplace`` the model itself. A failure leaves the model as it was.

        The model may have been given other weights since the plan was made, but not another structure.
        """
        if not self.converting:
            raise ConversionError(f"nothing to convert in {self.donor.name}:\n{self}")
        for owner in self.programs:
            if type(owner.module) is not owner.donor_class:
                raise ConversionError(
                    f"{owner.path or '(root)'} was rewritten since the plan was made; revert the model, or plan anew"
                )
        self._tell_of_kept_values()
        with plain_modes():
            model = self.model if inplace else independent(self.model)
        with all_or_nothing(model), plain_modes():
            expected = self.donor.expected(self.values)
            names = {id(planned.site): planned.target.name for planned in self.converting if planned.target is not None}
            for owner in self.programs:
                owner.install(model.get_submodule(owner.path), {names[id(site)] for site in owner.sites})
            if any(owner.reads_image for owner in self.programs):
                note_images(model, self.capture, self.looks.size)
            error = self._output_error(model, expected)
            self.looks.size.forget()
            watch_loading(model)
            told = self.report(error), self.places, self.record(error, vars(model).get("attnrewrite_record"))
            vars(model).update(zip(ATTRIBUTES, told, strict=True))
        return model

    def report(self, output_error: float | None = None) -> ConversionReport:
        """What is planned, as a report; ``output_error`` is known after ``apply``."""
        lost = {id(site): owner.lost for owner in self.programs for site in owner.sites}
        rows = [
            site_report(planned, self.flow, lost.get(id(planned.site), {}), self.read[id(planned.site)])
            for planned in self.sites
        ]
        rows += [SiteReport(r.name, r.kind, "", "refused", why=r.reason) for r in self.refused]
        shapes = [list(shape) for shape in self.shapes.values()]
        return ConversionReport(self.donor.name, shapes, rows, output_error, self._tied_sizes)

    def record(self, output_error: float | None = None, earlier: Record | None = None) -> Record:
        """What is planned, as a record that ``attnrewrite.replay`` does again; ``output_error`` is known after
        ``apply``, and ``earlier`` the record of a conversion that the model has gone through before."""
        return Record(
            model=self.donor.name,
            to={glob: RecordedTarget.of(target) for glob, target in self.wish.targets.items()},
            fidelity=self.wish.fidelity.name.lower(),  # type: ignore[arg-type]  # the name of a class
            inputs=self.shapes,
            sites=tuple(map(_recorded, self.sites)),
            tied_sizes=tuple(self._tied_sizes),
            kept_values={path: tuple(self.keeps[path]) for path in self._kept},
            output_error=output_error,
            versions=versions(),
            earlier=earlier,
        )

    def __str__(self) -> str:
        rows = [
            line(i, planned.site, planned.certificate) + TOLD[self.read[id(planned.site)]] + _fate(planned)
            for i, planned in enumerate(self.sites)
        ]
        rows += [f"refused {site.kind} @ {site.name or '(root)'}: {site.reason}" for site in self.refused]
        return "\n".join(rows)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the example inputs, by the names of forward's arguments."""
        given = {node.name: self.capture.tensors[node] for node in self.capture.inputs}
        return {name: tuple(value.shape) for name, value in given.items() if isinstance(value, Tensor)}

    @property
    def _tied_sizes(self) -> list[str]:
        return [
            f"{owner.path or '(root)'} ({', '.join(sorted(set(owner.fixed_to)))})"
            for owner in self.programs
            if owner.fixed_to
        ]

    @property
    def _kept(self) -> list[str]:
        return [owner.path for owner in self.programs if owner.path in self.keeps]

    def _tell_of_kept_values(self) -> None:
        keeping = [f"{path or '(root)'} ({', '.join(self.keeps[path])})" for path in self._kept]
        if keeping:
            warnings.warn(
                "rewritten modules do not set the attributes in which their originals keep what they computed: "
                f"{', '.join(keeping)}; what is there now is of an earlier run. Exclude these sites with keep=, or "
                "read the values with a hook on a module that is still called",
                ConversionWarning,
                stacklevel=3,
            )

    @property
    def _attention_weights(self) -> set[Node]:
        """Those that new operators have others for: how far they are from the old says nothing of the results."""
        sites = [planned.site for planned in self.converting]
        return {s.nodes.weights.node for s in sites if isinstance(s, AttentionSite) and s.nodes.weights is not None}

    def _output_error(self, model: nn.Module, expected: list[Any]) -> float:
        """Relative error of the outputs on the example input; an exact conversion must not change them.

        Raises:
            ConversionError: it did.
        """
        actual = outputs_of(model, *self.capture.example)
        exact = all(p.conversion.exactness is Exactness.EXACT for p in self.converting if p.conversion)
        shown = [exact or node not in self._attention_weights for node in self.donor.output_nodes]
        pairs = [(a, e) for a, e, compared in zip(actual, expected, shown, strict=True) if compared]
        error = max((relative_error(a.double(), e.double()) for a, e in pairs if isinstance(a, Tensor)), default=0.0)
        if exact and not error <= END_TO_END.get(expected[0].dtype, 5e-2):
            floor = self.donor.rounding(expected)
            if not error <= min(_OF_ROUNDING * floor, _TELLING):
                raise ConversionError(
                    f"the converted {self.donor.name} differs from the original by {error:.1e}, whose own outputs "
                    f"are rounded to {floor:.0e}, although every conversion is exact; the model was left as it "
                    f"was; {_BISECT}"
                )
        return error


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where rewriting ``model`` does not come to its end, whatever stopped it, everything is as it was before."""
    before = {module: vars(module).get("attnrewrite_rewriting") for module in model.modules()}
    told = {name: vars(model)[name] for name in ATTRIBUTES if name in vars(model)}
    try:
        yield
    except BaseException as cause:
        for module, rewriting in before.items():
            while vars(module).get("attnrewrite_rewriting") is not rewriting:
                restore_module(module)
        if all(rewriting is None for rewriting in before.values()):
            forget_images(model)
            forget_loading(model)
        for name in ATTRIBUTES:
            vars(model).pop(name, None)
        vars(model).update(told)
        if isinstance(cause, UNFORESEEN) and not isinstance(cause, AttnRewriteError):
            raise ConversionError(
                f"the converted {type(model).__name__} does not run ({first_line(cause)}); the model was left as it "
                f"was; {_BISECT}"
            ) from cause
        raise


def matching(glob: str, sites: Sequence[PlannedSite], argument: str) -> list[PlannedSite]:
    """Sites whose name matches ``glob``.

    Raises:
        ArgumentError: none does; the nearest names are suggested.
    """
    found = [planned for planned in sites if fnmatchcase(planned.site.name, glob)]
    if not found:
        names = [planned.site.name for planned in sites]
        raise ArgumentError(f"{argument}: {glob!r} matches no site{suggestion(glob, names)}")
    return found


def _recorded(planned: PlannedSite) -> RecordedSite:
    conversion, told = None, planned.conversion
    if planned.converting and told is not None and planned.target is not None:
        target, error = RecordedTarget.of(planned.target), planned.measured.get("error")
        conversion = RecordedConversion(target, planned.index, told.exactness.name, told.why, error)  # type: ignore[arg-type]  # the name of a class
    site, status = planned.site, status_of(planned)
    return RecordedSite(site.name, site.kind, site.describe(), status, planned.told, conversion)  # type: ignore[arg-type]  # a status


def _fate(planned: PlannedSite) -> str:
    if planned.converting and planned.conversion is not None:
        return f"   -> {planned.target} {planned.conversion.exactness.name}: {planned.conversion.why}"
    return f"   {planned.status}: {planned.told}" if planned.why else ""
