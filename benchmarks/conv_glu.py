"""The native kernels of the convolutional gate against the same gate by torch's own operators.

    python benchmarks/conv_glu.py --output docs/benchmarks/conv_glu_native.md

Both run through the operator, gradients and all, as a model calls it: ``plain`` is a depthwise convolution by torch, an
activation and a product. Maps are channels last, as linear maps leave them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
from attnrewrite.backends.native import library
from live_table import show
from measure import Timing, interleaved
from neighborhood import machine, milliseconds, ratio

from attnrewrite.functional import conv_glu

HIDDEN = {56: 384, 28: 768, 14: 768, 7: 1536}
"""Channels of the gates of TransNeXt-Tiny by the side of the map."""


@dataclass(frozen=True)
class Case:
    side: int
    kernel: int
    batch: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side}x{HIDDEN[self.side]}, {self.kernel}x{self.kernel}, batch {self.batch}"


def measure(case: Case, repeats: int) -> dict[str, Timing]:
    """Timings of both ways, forward alone and with the backward, in turns."""
    channels = HIDDEN[case.side]
    gate, value = (torch.randn(case.batch, case.side, case.side, channels) for _ in range(2))
    operands = [gate, torch.randn(channels, 1, case.kernel, case.kernel), torch.randn(channels), value]
    leaves = [each.clone().requires_grad_() for each in operands]
    cotangent = torch.randn_like(gate)

    def forward(backend: str) -> None:
        with torch.no_grad():
            conv_glu(*operands, backend=backend)

    def both(backend: str) -> None:
        torch.autograd.grad(conv_glu(*leaves, backend=backend), leaves, cotangent)

    methods: dict[str, Callable[[], object]] = {}
    for backend in ("native", "plain"):
        methods |= {backend: partial(forward, backend), f"{backend}, both": partial(both, backend)}
    return interleaved(methods, repeats, "cpu")


def row(case: Case, threads: int, timings: dict[str, Timing]) -> str:
    """One line of the table."""
    cells = [str(case), str(threads)]
    for way in ("", ", both"):
        native, plain = timings[f"native{way}"], timings[f"plain{way}"]
        cells += [milliseconds(native), milliseconds(plain), ratio(plain, native)]
    return f"| {' | '.join(cells)} |"


def header(repeats: int) -> str:
    return f"""# The convolutional gate by the native kernels

Depthwise convolution, GELU and the product with the value, in float32, against the same by torch's operators, forward
alone and with the backward. Medians of {repeats} rounds (quartiles in brackets); both take turns in one process, each
after an untimed call.

{machine("cpu").partition(",")[0]}, {library.kernels().instruction_set()}, torch {torch.__version__}, {date.today()}.

| map, filter, batch | threads | native (ms) | torch (ms) | times faster | native, both | torch, both | times faster |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    for threads, batch, (side, kernel) in product(arguments.threads, arguments.batches, product(HIDDEN, (3, 5))):
        torch.set_num_threads(threads)
        case = Case(side, kernel, batch)
        yield row(case, threads, measure(case, arguments.repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    if reason := library.missing():
        raise SystemExit(f"native kernels: {reason}")
    show(header(arguments.repeats), rows(arguments), arguments.output)


if __name__ == "__main__":
    main()
