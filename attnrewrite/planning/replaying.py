"""Plan again what a record says was done: nothing is searched and nothing measured, but every site is proved again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..capture.ambient import plain_modes
from ..capture.examples import image_for
from ..errors import ArgumentError, ConversionError
from ..graph.values import Values
from ..ir.contract import Target, exactness_of
from ..lift.looks import numbered_names
from ..numerics.draws import Stream
from .plan import Plan, Wish
from .planned_site import PlannedSite
from .record import Record, RecordedSite, RecordedTarget
from .stages import checked, classify, fit, lifted, look_around, prove, targeted


@plain_modes()
def replanned(model: nn.Module, record: Record, example_inputs: Any | None, progress: bool) -> Plan:
    """The plan that ``record`` was made from, for ``model``; arguments and errors as for ``replay``."""
    targets = _targets(record)
    plan = lifted(model, _example(model, record, example_inputs))
    _require_same_inputs(plan, record)
    plan = look_around(plan)
    recorded = _matched(plan, record)
    least = exactness_of(record.fidelity, "record.fidelity")
    sites = tuple(_chosen(*pair, targets) for pair in zip(plan.sites, recorded, strict=True))
    wish = Wish({glob: targets[repr(target)] for glob, target in record.to.items()}, least)
    plan = replace(plan, sites=sites, wish=wish)
    new_weights = Stream()

    def settle(planned: PlannedSite, values: Values) -> PlannedSite:
        with new_weights.drawn_from():
            planned = classify(planned, least, plan.flow)
            return fit(planned, plan.flow, values) if planned.converting else planned

    plan = checked(prove(plan, targeted(plan), progress, settle).build())
    _require_same_outcome(plan, recorded)
    return plan


def _targets(record: Record) -> dict[str, Target]:
    """The targets of a record, one of each, by their ``repr``."""
    places = {f"record.to.{glob}": target for glob, target in record.to.items()}
    places |= {
        f"record.sites[{number}].conversion.target": site.conversion.target
        for number, site in enumerate(record.sites)
        if site.conversion is not None
    }
    first: dict[str, tuple[str, RecordedTarget]] = {}
    for place, target in places.items():
        first.setdefault(repr(target), (place, target))
    return {key: target.make(place) for key, (place, target) in first.items()}


def _example(model: nn.Module, record: Record, example_inputs: Any | None) -> Any | None:
    """Where none is given and the record states one image: such an image."""
    shapes = list(record.inputs.values())
    if example_inputs is None and len(shapes) == 1 and len(shapes[0]) == 4 and min(shapes[0]) > 0:
        return image_for(model, shapes[0])
    return example_inputs


def _require_same_inputs(plan: Plan, record: Record) -> None:
    if plan.shapes != record.inputs:
        raise ArgumentError(
            f"example_inputs: the record was made with {_text(record.inputs)}, got {_text(plan.shapes)}; give inputs "
            "of the recorded shapes"
        )


def _text(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _matched(plan: Plan, record: Record) -> list[RecordedSite]:
    """What is recorded of every site of ``plan``.

    Raises:
        ConversionError: a site is another one, or is only here, or only in the record.
    """
    here = dict(zip(numbered_names(each.site for each in plan.sites), plan.sites, strict=True))
    recorded = dict(zip(numbered_names(record.sites), record.sites, strict=True))
    made_with = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    remedy = f"build the model as it was, or convert it anew (recorded with {made_with})"
    for name, kind, _ in (key for key in recorded if key not in here):
        raise ConversionError(f"record: {name or '(root)'}, its {kind}, is not in this {plan.donor.name}; {remedy}")
    for name, kind, _ in (key for key in here if key not in recorded):
        raise ConversionError(f"record: this {plan.donor.name} has more in {name or '(root)'}, its {kind}; {remedy}")
    for key, was in recorded.items():
        if here[key].site.describe() != was.source:
            raise ConversionError(
                f"record: {was.name or '(root)'} was {was.source}, and is {here[key].site.describe()} here; {remedy}"
            )
    return [recorded[key] for key in here]


def _chosen(planned: PlannedSite, recorded: RecordedSite, targets: dict[str, Target]) -> PlannedSite:
    done = recorded.conversion
    if done is None:
        return replace(planned, why=recorded.why) if recorded.status == "untouched" else planned.kept(recorded.why)
    return replace(planned, target=targets[repr(done.target)], index=done.index)


def _require_same_outcome(plan: Plan, sites: list[RecordedSite]) -> None:
    """Raises:
    ConversionError: a site cannot become what it became, or only in another class.
    """
    for planned, recorded in zip(plan.sites, sites, strict=True):
        done, conversion = recorded.conversion, planned.conversion
        if done is None:
            continue
        name, was = recorded.name or "(root)", f"{done.exactness} {done.target.name}"
        if not planned.converting or conversion is None:
            raise ConversionError(f"record: {name} became {was}, and cannot here: {planned.told}")
        if conversion.exactness.name != done.exactness:
            raise ConversionError(
                f"record: {name} became {was} ({done.why}), and would be {conversion.exactness.name} here "
                f"({conversion.why}); convert the model anew to take it"
            )
