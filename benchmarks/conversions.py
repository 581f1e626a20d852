"""Whole models before and after a conversion, side by side: what the counted work allows, and what the clock says.

    python benchmarks/conversions.py --output docs/benchmarks/conversions.md

Weights are random; inference is under ``inference_mode``, a training step is a forward and a backward in train mode.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from live_table import show
from measure import Timing, interleaved
from neighborhood import machine, milliseconds, ratio
from torch import Tensor, nn

import attnrewrite
from attnrewrite.hosts.loading import load_model


@dataclass(frozen=True)
class Conversion:
    """A model of timm at an image size, what it is converted to, and with which options."""

    name: str
    side: int
    target: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options)
        return f"{self.name.partition('_patch')[0]} at {self.side}, {self.target}{options}"


CONVERSIONS = (
    Conversion("swin_tiny_patch4_window7_224", 224, "neighborhood"),
    Conversion("swin_tiny_patch4_window7_224", 512, "neighborhood"),
    Conversion("vit_small_patch16_224", 512, "neighborhood", (("kernel_size", 7),)),
    Conversion("vit_small_patch16_224", 1024, "neighborhood", (("kernel_size", 7),)),
    Conversion("vit_small_patch16_224", 1024, "aggregated", (("pool", 4),)),
)


def row(conversion: Conversion, threads: int, repeats: int, training: bool) -> str:
    """One line of the table."""
    image = torch.randn(1, 3, conversion.side, conversion.side)
    model = load_model(f"timm:{conversion.name}", img_size=conversion.side).eval()
    converted = attnrewrite.convert(model, conversion.target, image, progress=False, **dict(conversion.options))
    before, after = (attnrewrite.analyze(each, image).total for each in (model, converted))
    inference = interleaved(
        {"before": partial(infer, model, image), "after": partial(infer, converted, image)}, repeats, "cpu"
    )
    cells = [str(conversion), str(threads), f"{before / after:.2f}", *_timed(inference)]
    if training:
        steps: dict[str, Callable[[], object]] = {
            "before": partial(step, model.train(), image), "after": partial(step, converted.train(), image),
        }  # fmt: skip
        cells += _timed(interleaved(steps, repeats, "cpu"))
    return f"| {' | '.join(cells)} |"


def _timed(timings: dict[str, Timing]) -> list[str]:
    return [milliseconds(timings["before"]), milliseconds(timings["after"]), ratio(timings["before"], timings["after"])]


def infer(model: nn.Module, image: Tensor) -> None:
    with torch.inference_mode():
        model(image)


def step(model: nn.Module, image: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(image).sum().backward()


def header(repeats: int) -> str:
    return f"""# Converted models beside their donors

Batch 1, float32. "Allowed" is the ratio of the counted multiply-accumulates; "faster" that of the times. Medians of
{repeats} rounds (quartiles in brackets); both models take turns in one process, each after an untimed call.

{machine("cpu")}, {date.today()}.

| conversion | threads | allowed | before (ms) | after (ms) | faster | step before (ms) | after (ms) | faster |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--training", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    show(header(arguments.repeats), rows(arguments), arguments.output)


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for conversion in CONVERSIONS:
            yield row(conversion, threads, arguments.repeats, arguments.training)


if __name__ == "__main__":
    main()
