"""The calls a user makes to convert a model: plan, convert, replay, revert, and what was done: report, record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..calibration import Calibration, calibrated
from ..calibration.images import Replay
from ..calibration.keep import Budget, keep_the_worst, require_budget
from ..calibration.measure import measured
from ..capture.ambient import plain_modes
from ..errors import ArgumentError, ConversionError
from ..planning.plan import ATTRIBUTES, Plan, all_or_nothing
from ..planning.record import Record
from ..planning.replaying import replanned
from ..planning.stages import Selector, To, planned
from ..reports.conversion import ConversionReport
from ..rewrite.image_sides import forget_images
from ..rewrite.rewritten import RewrittenModule, restore_module
from ..rewrite.saved_state import forget_loading

Told = TypeVar("Told", ConversionReport, Record)


@plain_modes()
def plan(
    model: nn.Module,
    to: To,
    example_inputs: Any | None = None,
    *,
    sites: Selector | None = None,
    keep: Selector | None = None,
    budget: Budget | None = None,
    measure: Any | None = None,
    fidelity: str = "projected",
    max_rewrites: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Decide, certify and measure a conversion without changing the model; arguments and errors as for ``convert``.

    The plan is data: it prints, ``drop`` and ``limit`` give edited ones, and it can be applied later.
    """
    automatic = keep == "auto"
    require_budget(automatic, budget)
    made = planned(
        model, example_inputs, to, options, sites=sites, keep=None if automatic else keep, fidelity=fidelity,
        max_rewrites=max_rewrites, progress=progress,
    )  # fmt: skip
    return keep_the_worst(made, budget, measure) if automatic else made


def convert(
    model: nn.Module,
    to: To,
    example_inputs: Any | None = None,
    *,
    sites: Selector | None = None,
    keep: Selector | None = None,
    fidelity: str = "projected",
    budget: Budget | None = None,
    calibrate: Any | None = None,
    measure: Any | None = None,
    strict: bool = False,
    inplace: bool = False,
    progress: bool = True,
    return_report: bool = False,
    max_rewrites: int | None = None,
    **options: Any,
) -> Any:
    """Rewrite a model's attention (and what else the target covers), weights carried, every site certified.

    Args:
        model: any ``nn.Module`` that ``torch.export`` can capture; parallel and compiled wrappers go around it later.
        to: a target's name (``options`` are its options, such as ``kernel_size``), a target object, or a mapping from
            site globs to either, the first match winning.
        example_inputs: what ``forward`` takes: a tensor ``[batch, channels, height, width]``, a tuple, or a dict; by
            default derived from the model's configuration where that states an image size.
        sites, keep: convert only, or leave alone, the sites of these names (globs) or for which a predicate holds.
            ``keep="auto"`` leaves alone those that do the most harm, each measured alone, until ``budget`` holds.
        budget: for ``keep="auto"``: the largest relative error of the outputs, or ``{"agreement": 0.95}``, the smallest
            share of images that keep their largest output, uncalibrated, on ``measure``, ``calibrate`` or the example.
        calibrate: unlabeled images, or a ``Calibration``: recover what was lost, as ``attnrewrite.calibrate`` does.
        measure: images to measure the error on, as ``calibrate`` takes them: of every site alone, and of the model.
        fidelity: the least class accepted: "exact", "continuous", "projected" or "fresh". Sites below are left alone.
        strict: raise if any site that was asked for is not converted.
        inplace: change ``model`` itself instead of a copy.
        progress: show a progress bar on a terminal.
        return_report: return ``(model, report)``; the report is ``attnrewrite.report(model)`` too.
        max_rewrites: convert the first so many sites only.

    Returns:
        The converted model, still of the donor's classes; parameters that no site replaced keep their names, and with
        ``inplace`` stay the same objects.

    Raises:
        ArgumentError: invalid argument or combination of arguments.
        CalibrationError: the images of ``calibrate``, ``measure`` or the budget cannot be used.
        CaptureError: the model cannot be exported.
        ConversionError: nothing could be converted, or with ``strict`` not everything. The model is left untouched.
    """
    if inplace and (calibrate is not None or measure is not None):
        raise ArgumentError("inplace: calibrate and measure need the original beside the converted model; leave it out")
    calibration, measure = _calibration(calibrate, progress), _replayable(measure)
    made = plan(
        model, to, example_inputs, sites=sites, keep=keep, budget=budget, fidelity=fidelity, max_rewrites=max_rewrites,
        progress=progress, measure=_images_of(calibration) if measure is None else measure, **options,
    )  # fmt: skip
    if strict:
        _require_all(made)
    converted = _recovered(made, made.apply(inplace), measure, calibration)
    return (converted, report(converted)) if return_report else converted


def _recovered(made: Plan, converted: nn.Module, measure: Any | None, calibration: Calibration | None) -> nn.Module:
    if measure is not None:
        converted.attnrewrite_report = measured(made, converted, measure)  # type: ignore[assignment]  # an attribute of its own
    return converted if calibration is None else calibrated(converted, made.model, calibration)


def _require_all(made: Plan) -> None:
    left = [each for each in made.sites if each.target is not None and each.status in ("refused", "kept")]
    if left:
        reasons = "".join(f"\n  {each.site.name or '(root)'}: {each.told}" for each in left)
        name = made.donor.name
        raise ConversionError(f"strict: {len(left)} sites of {name} would not be converted:{reasons}")


def _calibration(given: Any | None, progress: bool) -> Calibration | None:
    if given is None:
        return None
    calibration = given if isinstance(given, Calibration) else Calibration(given, progress=progress)
    return replace(calibration, data=_replayable(calibration.data))


def _replayable(data: Any) -> Any:
    """Data that can be gone through twice: for the sites to keep, and for what follows."""
    return Replay(data) if isinstance(data, Iterator) else data


def _images_of(calibration: Calibration | None) -> Any | None:
    return None if calibration is None else calibration.data


def revert(model: nn.Module) -> nn.Module:
    """Give every rewritten module its own forward back, in place, and return the model.

    Raises:
        ArgumentError: nothing in the model was rewritten.
    """
    rewritten = [module for module in model.modules() if isinstance(module, RewrittenModule)]
    if not rewritten:
        raise ArgumentError(f"model: nothing in {type(model).__name__} was rewritten, so there is nothing to revert")
    for module in rewritten:
        while isinstance(module, RewrittenModule):  # a model converted twice was rewritten twice
            restore_module(module)
    forget_images(model)
    forget_loading(model)
    for name in ATTRIBUTES:
        model.__dict__.pop(name, None)
    return model


def report(model: nn.Module) -> ConversionReport:
    """What ``convert`` did to ``model``.

    Raises:
        ArgumentError: it was not converted.
    """
    return _left_on(model, "attnrewrite_report", ConversionReport)


def record(model: nn.Module) -> Record:
    """What ``convert`` did to ``model``, as data for ``replay``: ``to_json`` writes it, ``Record.from_json`` reads it.

    Raises:
        ArgumentError: it was not converted.
    """
    return _left_on(model, "attnrewrite_record", Record)


def _left_on(model: nn.Module, name: str, kind: type[Told]) -> Told:
    """The attribute in which a conversion left what it did."""
    told = getattr(model, name, None)
    if not isinstance(told, kind):
        raise ArgumentError(
            f"model: {type(model).__name__} was not made by attnrewrite.convert; pass the model that convert returned"
        )
    return told


def replay(
    model: nn.Module,
    record: Record,
    example_inputs: Any | None = None,
    *,
    inplace: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Do to ``model`` what was done to another of its architecture. Nothing is searched, chosen or measured, but every
    site is proved and checked again.

    Weights are carried from ``model``; those of the converted model, which may have been trained or refitted, come with
    its ``state_dict()``, which the result takes.

    Args:
        record: ``attnrewrite.record(converted)``, or ``attnrewrite.Record.from_json(text)``.
        example_inputs: of the recorded shapes; by default an image of the recorded shape, if the model took one image.
        inplace, progress: as for ``convert``.

    Raises:
        ArgumentError: no record, inputs of other shapes, or a target that is not known here.
        CaptureError: the model cannot be exported.
        ConversionError: a site is not what it was, or cannot become what it became. The model is left untouched.
    """
    if not isinstance(record, Record):
        raise ArgumentError(
            f"record: expected a Record, got {type(record).__name__}; read one with attnrewrite.Record.from_json"
        )
    with all_or_nothing(model):
        if record.earlier is not None:
            model = replay(model, record.earlier, example_inputs, inplace=inplace, progress=progress)
            inplace = True  # what is now converted again is a copy already, unless it was asked for in place
        return replanned(model, record, example_inputs, progress).apply(inplace)
