"""Recover what a conversion lost, from unlabeled images; never worse than before on those held out."""

from __future__ import annotations

import copy
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import UNFORESEEN, ArgumentError, CalibrationError, first_line
from ..planning.places import Place
from ..reports.conversion import CalibrationReport, ConversionReport, SiteErrors
from .distill import control, distill
from .images import Images, call, collect
from .least_squares import Pair, Refit, correct_bias, refit_projection, write
from .measure import measure_model, measure_sites
from .readout import token_weights
from .settings import Calibration
from .state import State, fingerprint_of
from .streams import evaluating
from .value_step import refit_value


def calibrate(
    converted: nn.Module,
    original: nn.Module,
    data: Any,
    *,
    method: str = "lsq",
    n: int = 256,
    ridge: float = 1e-2,
    holdout: float = 0.25,
    token_weights: str = "readout",
    value_step: bool | None = None,
    seed: int = 0,
    steps: int | None = None,
    lr: float | None = None,
    resume: str | PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """A copy of ``converted`` with weights that bring it nearer to ``original``, by unlabeled images.

    ``"lsq"`` goes through the sites in forward order and refits each output projection, in closed form and towards its
    old weights, so that the residual stream after it is the original's; a value projection too where that wins on the
    held-out images. Nothing is stored a token, and nothing is trained. Every site's refit, and in the end all of them,
    is taken back if it does not win on the held-out images. Under ``torchrun`` every process gives its own images.

    Args:
        converted: what ``convert`` made of ``original``, also after it was saved and loaded.
        original: the model before; both on one device.
        data, method, n, ridge, holdout, token_weights, value_step, seed, steps, lr, resume, progress: see
            ``Calibration``.

    Returns:
        The calibrated model; ``attnrewrite.report`` of it has what was done and the errors before and after.

    Raises:
        ArgumentError: a setting has no meaning, or ``converted`` was not made by ``convert``.
        CalibrationError: the data cannot be used, or the two models do not belong together.
    """
    settings = Calibration(
        data, method, n, ridge, holdout, token_weights, value_step, seed, steps, lr, resume, progress
    )  # fmt: skip
    return calibrated(converted, original, settings)


def calibrated(converted: nn.Module, original: nn.Module, settings: Calibration) -> nn.Module:
    """``calibrate`` with its settings as one object."""
    places, report = _made_by_convert(converted)
    images = collect(settings.data, settings.n, original, holdout=settings.holdout, seed=settings.seed, least=2)
    model = copy.deepcopy(converted)
    with evaluating(model, original):
        _try(original, "original", images)
        _try(model, "converted", images)
        before = measure_model(model, original, images, images.held)
        sites_before = measure_sites(model, original, places, images, images.held)
        state = _state(model, original, images, settings)
        outcome: dict[str, str] = {}
        floor = None
        if settings.method == "distill":
            distill(model, original, images, settings, state)
            floor = measure_model(control(original, images, settings, state), original, images, images.held)
        else:
            outcome = _refitted(model, original, places, images, settings, state)
        after = measure_model(model, original, images, images.held)
        reverted = not after.logits <= before.logits
        if reverted:
            model.load_state_dict(converted.state_dict())
            after = before
        sites_after = sites_before if reverted else measure_sites(model, original, places, images, images.held)
    done = CalibrationReport(settings.of_result(), before, after, outcome, reverted, floor)
    model.attnrewrite_report = _extended(report, done, sites_before, sites_after)  # type: ignore[assignment]  # an attribute of its own
    return model


def _made_by_convert(converted: nn.Module) -> tuple[list[Place], ConversionReport]:
    places, report = getattr(converted, "attnrewrite_places", None), getattr(converted, "attnrewrite_report", None)
    if places is None or not isinstance(report, ConversionReport):
        raise ArgumentError(
            f"converted: expected a result of attnrewrite.convert, got {type(converted).__name__}; convert the model "
            "first"
        )
    return places, report


def _try(model: nn.Module, argument: str, images: Images) -> None:
    batch = {name: value[:1] for name, value in next(images.batches()).items()}
    try:
        with torch.no_grad():
            call(model, batch)
    except UNFORESEEN as cause:
        shapes = ", ".join(str(tuple(value.shape)) for value in batch.values())
        raise CalibrationError(
            f"data: {argument} rejects images of shape {shapes} ({first_line(cause)}); pass images that both models "
            "accept"
        ) from cause


def _state(model: nn.Module, original: nn.Module, images: Images, settings: Calibration) -> State:
    """What an earlier run of the same left behind, if there is any."""
    fingerprint = {
        "images": images.fingerprint(), "weights of converted": fingerprint_of(model),
        "weights of original": fingerprint_of(original), "settings": repr(sorted(settings.of_result().items())),
    }  # fmt: skip
    state = State(None if settings.resume is None else Path(settings.resume), fingerprint)
    state.load()
    return state


def _refitted(
    model: nn.Module, original: nn.Module, places: list[Place], images: Images, settings: Calibration, state: State
) -> dict[str, str]:
    """Refit place by place in forward order, in place; what was done by site."""
    weights = token_weights(original, places, images, settings.seed) if settings.token_weights == "readout" else {}
    pair = Pair(model, original, images, weights)
    write(model, state.parameters)
    for place in tqdm(places, desc="calibrate", disable=None if settings.progress else True, leave=False):
        if any(record["name"] == place.name for record in state.done):
            continue
        what, parameters = _refit_place(pair, place, settings)
        state.save({"name": place.name, "what": what}, parameters)
    return {record["name"]: record["what"] for record in state.done}


def _refit_place(pair: Pair, place: Place, settings: Calibration) -> tuple[str, dict[str, torch.Tensor]]:
    if place.why:
        return f"skipped: {place.why}", {}
    try:
        pair.check(place)
        refit = _best(pair, place, settings)
    except (CalibrationError, torch.linalg.LinAlgError) as reason:
        return f"skipped: {first_line(reason)}", {}
    if not refit.wins:
        return f"taken back: {refit.what} is no better on held-out images", {}
    write(pair.model, refit.parameters)
    return refit.what, refit.parameters


def _best(pair: Pair, place: Place, settings: Calibration) -> Refit:
    if settings.method == "bias":
        return correct_bias(pair, place)
    refit = refit_projection(pair, place, settings.ridge)
    if settings.value_step is not False:
        other = refit_value(pair, place, settings.ridge)
        if other is not None and other.after < refit.after:
            return other
    return refit


def _extended(
    report: ConversionReport, done: CalibrationReport, before: dict[str, SiteErrors], after: dict[str, SiteErrors]
) -> ConversionReport:
    rows = [
        replace(row, errors=before.get(row.name, row.errors), calibrated=after.get(row.name, row.calibrated))
        for row in report.sites
    ]
    return replace(report, sites=rows, calibration=done)
