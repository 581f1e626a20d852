"""``python -m attnrewrite COMMAND``: one function a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .backends.native.build import build, cache_folder
from .capture.examples import example_inputs_for
from .costs import analyze
from .costs.count.cost import CONVENTIONS
from .costs.count.size_tracer import SizeTracer
from .errors import ArgumentError, AttnRewriteError
from .hosts.loading import load_model
from .models import create_model, list_models


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m attnrewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_analyze(commands)
    _add_build(commands)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except AttnRewriteError as cause:
        print(f"attnrewrite: {cause}", file=sys.stderr)
        return 2
    return 0


def _add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("analyze", help="what a model costs, counted and as formulas in the image's size")
    parser.add_argument(
        "model", help="NAME, timm:NAME, torchvision:NAME, transformers:CLASS, FILE.py:FACTORY, or a bare name"
    )
    parser.add_argument("--size", help="HEIGHTxWIDTH or one side, in pixels; default: what the model states")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--convention", default="mac", help=", ".join(CONVENTIONS))
    parser.add_argument("--to", help="a conversion target, whose cost to state beside the model's own")
    parser.add_argument("--compare", metavar="MODEL", help="another model, to stand beside this one")
    parser.add_argument("--hardware", help="for the roofline in the page, e.g. h200")
    parser.add_argument("--html", metavar="FILE", help="write a page")
    parser.add_argument("--json", metavar="FILE", help="write JSON")
    parser.set_defaults(run=_analyze)


def _analyze(given: argparse.Namespace) -> None:
    sides = _sides(given.size)
    model, image = _model_and_image(given.model, sides, given.batch)
    report = analyze(model, image, to=given.to, convention=given.convention, hardware=given.hardware)
    if given.compare:
        other, image = _model_and_image(given.compare, sides, given.batch)
        report.comparisons.append(report.compare(analyze(other, image)))
    print(report)
    if given.json:
        report.to_json(given.json)
    if given.html:
        report.to_html(given.html)


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("build", help="compile the native kernels for this user; it takes a C++ compiler")
    parser.set_defaults(run=lambda given: print(build(cache_folder())))


def _model_and_image(spec: str, sides: tuple[int, int] | None, batch: int) -> tuple[nn.Module, Tensor]:
    """The model, built for that size if it takes no other, and an image without storage: only its shape is read."""
    if batch < 1:
        raise ArgumentError(f"--batch: must be at least 1, got {batch}")
    model = _built(spec)
    stated = example_inputs_for(model) if sides is None else None
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    shape = (channels, *sides) if sides is not None else tuple(stated.shape[1:]) if stated is not None else ()
    image = torch.zeros(()).expand(batch, *shape)
    if sides is not None and not SizeTracer(model, ((image,), {})).takes_example:
        with suppress(TypeError):
            model = _built(spec, img_size=sides)
    return model, image


def _built(spec: str, **options: Any) -> nn.Module:
    """A model of this library by its name, or another library's."""
    return create_model(spec, **options) if spec in list_models() else load_model(spec, **options)


def _sides(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ArgumentError(f"--size: expected HEIGHTxWIDTH such as 512x384, got {size!r}")
    return int(sides[0]), int(sides[-1])


if __name__ == "__main__":
    sys.exit(main())
