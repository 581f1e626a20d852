"""The calls a user makes: convert, revert, report, explain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import ArgumentError, ConversionError
from .planning import Selector, plan
from .report import ConversionReport
from .rewrite.aspect import release_aspect
from .rewrite.rewritten import RewrittenModule, restore_module
from .targets import Target


def convert(
    model: nn.Module,
    to: str | Target | Mapping[str, str | Target],
    example_inputs: Any | None = None,
    *,
    sites: Selector | None = None,
    keep: Selector | None = None,
    fidelity: str = "projected",
    calibrate: Any | None = None,
    strict: bool = False,
    inplace: bool = False,
    progress: bool = True,
    return_report: bool = False,
    max_rewrites: int | None = None,
    **options: Any,
) -> Any:
    """Rewrite a model's attention (and what else the target covers), weights carried, every site certified.

    Args:
        model: any ``nn.Module`` that ``torch.export`` can capture; a model wrapped for parallel training or compilation
            is refused: convert first, then wrap.
        to: a target's name (``options`` are its options, such as ``kernel_size``), a target object, or a mapping from
            site globs to either, the first match winning.
        example_inputs: what ``forward`` takes: a tensor ``[batch, channels, height, width]``, a tuple, or a dict.
            Derived from the model's own configuration where that states an image size.
        sites, keep: convert only, or leave alone, the sites of these names (globs) or for which a predicate holds.
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
        ArgumentError: an argument has no meaning here.
        CaptureError: the model cannot be exported.
        ConversionError: nothing could be converted, or with ``strict`` not everything. The model is left untouched.
    """
    if calibrate is not None:
        raise ArgumentError("calibrate: calibration is not available yet; convert without it")
    made = plan(
        model, to, example_inputs, sites=sites, keep=keep, fidelity=fidelity, max_rewrites=max_rewrites,
        progress=progress, **options,
    )  # fmt: skip
    asked = [planned for planned in made.sites if planned.target is not None]
    left = [planned for planned in asked if planned.status in ("refused", "kept")]
    if strict and left:
        reasons = "".join(f"\n  {planned.site.name or '(root)'}: {planned.why}" for planned in left)
        raise ConversionError(f"strict: {len(left)} sites of {type(model).__name__} would not be converted:{reasons}")
    converted = made.apply(inplace)
    return (converted, report(converted)) if return_report else converted


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
    release_aspect(model)
    model.__dict__.pop("attnrewrite_report", None)
    return model


def report(model: nn.Module) -> ConversionReport:
    """What ``convert`` did to ``model``.

    Raises:
        ArgumentError: it was not converted.
    """
    found = getattr(model, "attnrewrite_report", None)
    if not isinstance(found, ConversionReport):
        raise ArgumentError(f"model: {type(model).__name__} was not made by attnrewrite.convert")
    return found
