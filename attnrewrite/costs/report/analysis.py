"""``attnrewrite.analyze``: the cost of a model, counted and as formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...capture.examples import normalize_inputs
from ...errors import ArgumentError
from ...ir.contract import Target
from ..count.cost import require_convention
from .hardware import Hardware, hardware_of
from .report import Report
from .what_if import To, converted_cost


def analyze(
    model: nn.Module,
    example_inputs: Any | None = None,
    *,
    compare: nn.Module | Report | None = None,
    to: To | Sequence[To] | None = None,
    fidelity: str = "projected",
    convention: str = "mac",
    hardware: str | Hardware | None = None,
    **options: Any,
) -> Report:
    """What ``model`` costs, as numbers on the example and as formulas in the image's height and width.

    The model is neither run nor changed: its operations are counted on the meta device, and its sites are read from its
    captured graph. Every formula is checked against the count to the integer; a difference is listed.

    Args:
        example_inputs: what ``forward`` takes, an image ``[batch, channels, height, width]`` or more; derived from the
            model's own configuration where that states a size.
        compare: another model, or its report, to stand beside this one.
        to, fidelity: what ``convert`` takes, or several of the former: the cost of that conversion is stated beside the
            present one, without converting. ``options`` are those of a single target (``kernel_size``, ``pool``, …).
        convention: ``"mac"`` (multiply-accumulates of contractions: what papers of these families call FLOPs),
            ``"flop"`` (twice that) or ``"fvcore"`` (plus its price of normalization and pooling).
        hardware: for ``Report.roofline``.

    Raises:
        ArgumentError: invalid argument or combination of arguments.
        CaptureError: the model's cost depends on values, so that shapes alone do not tell it; with ``to``, it cannot be
            captured.
        ConversionError: nothing would be converted.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if compare is not None and to is not None:
        raise ArgumentError("compare: pass compare or to, not both; call the report's compare() for more models")
    if options and to is None:
        raise ArgumentError(f"{next(iter(options))}: options belong to a target; pass to= as well")
    machine = None if hardware is None else hardware_of(hardware)
    found = Report(model, normalize_inputs(model, example_inputs), require_convention(convention), machine)
    targets = [] if to is None else [to] if isinstance(to, str | Target | Mapping) else list(to)
    if options and len(targets) > 1:
        raise ArgumentError(f"{next(iter(options))}: with several targets, set options in target objects")
    found.comparisons = [converted_cost(found, target, options, fidelity) for target in targets]
    if compare is not None:
        other = compare if isinstance(compare, Report) else analyze(compare, example_inputs, convention=convention)
        found.comparisons.append(found.compare(other))
    return found
