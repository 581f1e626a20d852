"""The native kernels of local attention against dense attention, FlexAttention and the machine itself.

    python benchmarks/local_attention.py --output docs/benchmarks/local_attention_native.md

Operands are heads last for the kernels, as projections leave them, and heads first for the others, as they like them
best: what is packed is timed, and nothing is transposed for anybody. Dense attention computes something else, and costs
what a model pays that does not attend locally.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
from attnrewrite.backends.native import library
from live_table import show
from measure import Timing, interleaved
from neighborhood import Case, compiled_flex, machine, milliseconds, neighborhood_mask, ratio
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SIDES = {56: 4, 28: 8, 14: 16}
"""Heads by the side of the map, as in the stages of a vision transformer."""

GEMM = 1024


def measure(case: Case, kernel: int, repeats: int, flex: bool) -> dict[str, Timing]:
    """Timings of all methods of a case, in turns."""
    maps = [torch.randn(case.batch, case.side, case.side, case.heads, case.head_dim) for _ in range(3)]
    rows = [each.flatten(1, 2).transpose(1, 2).contiguous() for each in maps]
    leaves = [each.detach().requires_grad_() for each in rows]
    cotangent, square = torch.randn_like(maps[0]), torch.randn(GEMM, GEMM)
    rest = (*(None,) * 6, [kernel] * 2, [1, 1], True, case.head_dim**-0.5)
    attend, differentiate = library.kernels().local_attention, library.kernels().local_attention_backward
    grad_lse = torch.zeros(maps[0].shape[:-1])

    def train() -> None:
        attend(*maps, *rest)
        differentiate(cotangent, grad_lse, *maps, *rest)

    methods: dict[str, Callable[[], object]] = {
        "native": partial(attend, *maps, *rest),
        "native, both": train,
        "dense": partial(_dense, rows),
        "dense, both": partial(_dense_gradients, leaves),
        "gemm": partial(torch.mm, square, square),
    }
    if flex:
        torch.compiler.reset()
        mask = neighborhood_mask(case.side, kernel, "cpu")
        methods["flex"] = partial(torch.no_grad()(compiled_flex(mask, "cpu")), *rows)
    return interleaved(methods, repeats, "cpu")


def _dense(rows: list[Tensor]) -> Tensor:
    query, key, value = rows
    return scaled_dot_product_attention(query, key, value)


def _dense_gradients(leaves: list[Tensor]) -> None:
    output = _dense(leaves)
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def row(case: Case, kernel: int, threads: int, timings: dict[str, Timing]) -> str:
    """One line of the table."""
    flops = 4 * case.batch * case.heads * case.side**2 * kernel**2 * case.head_dim
    peak = 2 * GEMM**3 / timings["gemm"].median
    cells = [
        str(case), str(threads), milliseconds(timings["native"]), ratio(timings["dense"], timings["native"]),
        ratio(timings["flex"], timings["native"]) if "flex" in timings else "",
        f"{flops / timings['native'].median / peak:.0%}", ratio(timings["dense, both"], timings["native, both"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def header(repeats: int) -> str:
    return f"""# Local attention by the native kernels, kernel size 7

How many times faster than plain dense attention (`scaled_dot_product_attention`) and than compiled FlexAttention with
the same window, and which part of the machine's own speed in products of {GEMM}x{GEMM} matrices is reached.
float32, heads last. Medians of {repeats} rounds (quartiles in brackets); all methods take turns in one process, each
after an untimed call.

{machine("cpu").partition(",")[0]}, {library.kernels().instruction_set()}, torch {torch.__version__}, {date.today()}.

| map, heads x head_dim, batch | threads | forward (ms) | times dense | times flex | of gemm | both ways, times dense |
|---|---:|---:|---:|---:|---:|---:|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="compile FlexAttention")
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    if reason := library.missing():
        parser.error(reason)
    show(header(arguments.repeats), rows(arguments), arguments.output)


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    for threads, batch in product(arguments.threads, arguments.batches):
        torch.set_num_threads(threads)
        for side, heads in SIDES.items():
            case = Case(side, heads, batch)
            timings = measure(case, arguments.kernel_size, arguments.repeats, arguments.flex and batch == 1)
            yield row(case, arguments.kernel_size, threads, timings)


if __name__ == "__main__":
    main()
