"""What a conversion costs in accuracy: every site alone, and the whole model, against the original on real images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, NothingToDo
from ..ir.contract import Conversion
from ..planning.places import Place, tokens
from ..planning.plan import Plan
from ..planning.registry import target_of
from ..reports.conversion import ConversionReport, ModelErrors, SiteErrors
from ..rewrite.owners import build_programs
from .images import Images, call, collect, logits
from .parallel import summed
from .streams import evaluating, read_all


def measure_model(model: nn.Module, original: nn.Module, images: Images, chosen: Tensor | None = None) -> ModelErrors:
    """Relative error of the outputs and share of images with the same largest one, over all or the ``chosen``."""
    sums = _Sums()
    with torch.no_grad(), evaluating(model, original):
        for batch in images.batches(chosen):
            sums.add(logits(call(model, batch)), logits(call(original, batch)))
    return sums.of_model()


def measure_sites(
    model: nn.Module, original: nn.Module, places: list[Place], images: Images, chosen: Tensor | None = None
) -> dict[str, SiteErrors]:
    """The errors of every rewritten site, each with the original's other modules around it.

    Sites that one module owns are converted together and share the error of the outputs.
    """
    scratch = copy.deepcopy(original)
    found: dict[str, SiteErrors] = {}
    with torch.no_grad(), evaluating(model, original, scratch):
        for owner in dict.fromkeys(place.owner for place in places if place.owner is not None):
            owned = [place for place in places if place.owner == owner]
            with _only(scratch, model, owner) as hybrid:
                found |= _errors_of(hybrid, original, owned, images, chosen)
    return found


def measured(plan: Plan, converted: nn.Module, data: Any) -> ConversionReport:
    """The report of ``converted``, which ``plan`` made, with errors measured on ``data``."""
    images = images_for(plan, data)
    alone = measure_sites(converted, plan.model, plan.places, images)
    report = converted.attnrewrite_report
    assert isinstance(report, ConversionReport)
    rows = [replace(row, errors=alone.get(row.name)) for row in report.sites]
    errors = measure_model(converted, plan.model, images)
    same = null_rewrite(plan)
    floor = None if same is None else measure_model(same, plan.model, images)
    return replace(report, sites=rows, errors=errors, floor=floor)


def images_for(plan: Plan, data: Any | None) -> Images:
    """Images of ``data``; without any, the example input of the plan."""
    if data is not None:
        return collect(data, 256, plan.model)
    args, kwargs = plan.capture.example
    return collect(args[0] if args else kwargs, 256, plan.model)


def null_rewrite(plan: Plan) -> nn.Module | None:
    """The model with the same sites rewritten to what they were: what a rewrite alone does to the outputs."""
    identity = target_of("identity")
    conversions: dict[int, Conversion] = {}
    for owner in plan.programs:
        for site in owner.sites:
            try:
                conversions[id(site)] = identity.convert(site, 0, plan.flow.weights)
            except NothingToDo:
                return None
    sites = [site for owner in plan.programs for site in owner.sites]
    programs, failed = build_programs(plan.capture, sites, plan.looks, lambda site: conversions[id(site)])
    if failed:
        return None
    model = copy.deepcopy(plan.model)
    for program in programs:
        program.install(model.get_submodule(program.path))
    return model


def _errors_of(
    hybrid: nn.Module, original: nn.Module, owned: list[Place], images: Images, chosen: Tensor | None
) -> dict[str, SiteErrors]:
    seen = [place for place in owned if place.before is not None and place.after is not None]
    taps = [tap for place in seen for tap in (place.before, place.after) if tap is not None]
    outputs, streams = _Sums(), {place.name: _StreamSums() for place in seen}
    for batch in images.batches(chosen):
        new, output = read_all(hybrid, batch, taps)
        old, expected = read_all(original, batch, taps)
        outputs.add(logits(output), logits(expected))
        for i, place in enumerate(seen):
            streams[place.name].add(
                *(tokens(value).double() for value in (*new[2 * i : 2 * i + 2], *old[2 * i : 2 * i + 2]))
            )
    whole = outputs.of_model()
    return {place.name: _site(streams.get(place.name), whole) for place in owned}


def _site(stream: _StreamSums | None, whole: ModelErrors) -> SiteErrors:
    local, relative = stream.errors() if stream is not None else (None, None)
    return SiteErrors(local, relative, whole.logits, whole.agreement)


@contextmanager
def _only(scratch: nn.Module, model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The original with the one module at ``path`` as it is in the converted model."""
    if not path:
        yield model
        return
    parent, _, name = path.rpartition(".")
    holder = scratch.get_submodule(parent)
    before = holder._modules[name]
    holder._modules[name] = model.get_submodule(path)
    try:
        yield scratch
    finally:
        holder._modules[name] = before


class _Sums:
    """Of squared output errors, squared outputs, images of the same largest output, and images."""

    def __init__(self) -> None:
        self.values = torch.zeros(4, dtype=torch.float64)
        self.classes = True

    def add(self, actual: Tensor, expected: Tensor) -> None:
        if actual.shape != expected.shape:
            raise CalibrationError(
                f"original: its output has shape {tuple(expected.shape)}, the converted model's {tuple(actual.shape)}; "
                "give the model that was converted"
            )
        self.classes &= expected.dim() == 2
        error, square = (actual.double() - expected.double()).square().sum(), expected.double().square().sum()
        same = (actual.argmax(-1) == expected.argmax(-1)).sum()
        self.values += torch.stack(
            [error, square, same.double(), torch.tensor(float(len(actual)), device=same.device)]
        ).cpu()

    def of_model(self) -> ModelErrors:
        summed(self.values)
        error, square, same, images = self.values.tolist()
        relative = (error / square) ** 0.5 if square else (0.0 if not error else float("inf"))
        return ModelErrors(relative, same / images if self.classes else None, int(images))


class _StreamSums:
    """Of squared stream errors beside the squared stream and the squared branch."""

    def __init__(self) -> None:
        self.values = torch.zeros(3, dtype=torch.float64)

    def add(self, _before: Tensor, after: Tensor, before: Tensor, expected: Tensor) -> None:
        parts = (after - expected, expected, expected - before)
        self.values += torch.stack([part.square().sum() for part in parts]).cpu()

    def errors(self) -> tuple[float | None, float | None]:
        """Relative to the site's branch, and relative to the stream."""
        summed(self.values)
        error, stream, branch = self.values.tolist()
        return (error / branch) ** 0.5 if branch else None, (error / stream) ** 0.5 if stream else None
