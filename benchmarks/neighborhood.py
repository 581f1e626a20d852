"""Neighborhood attention against dense attention, as ratios to masked dense attention.

    python benchmarks/neighborhood.py --output docs/benchmarks/neighborhood_cpu.md

Every method gets its operands in the layout it likes best, so no transposition is timed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Timing, interleaved
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attnrewrite.functional import neighborhood_attention
from attnrewrite.operators.index_rule import AxisRule, axis_table

BASELINE = "masked dense"
Method = tuple[Callable[..., Any], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A square map, as in a stage of a vision transformer."""

    side: int
    heads: int
    batch: int
    head_dim: int = 32

    def __str__(self) -> str:
        return f"{self.side}x{self.side}, {self.heads}x{self.head_dim}, batch {self.batch}"


def methods(case: Case, kernel: int, device: str, flex: bool) -> dict[str, Method]:
    """Every method, with its operands."""
    maps = [
        torch.randn(case.batch, case.side, case.side, case.heads, case.head_dim, device=device)
        for _ in range(3)
    ]
    rows = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in maps]
    mask = neighborhood_mask(case.side, kernel, device)
    every: dict[str, Method] = {
        "tiled": (partial(neighborhood_attention, kernel_size=kernel, backend="tiled"), maps),
        "reference": (partial(neighborhood_attention, kernel_size=kernel, backend="reference"), maps),
        BASELINE: (partial(scaled_dot_product_attention, attn_mask=mask), rows),
        "plain dense": (scaled_dot_product_attention, rows),
    }
    if flex:
        every["compiled flex"] = (compiled_flex(mask, device), rows)
    return every


def neighborhood_mask(side: int, kernel: int, device: str) -> Tensor:
    """True where query row may see key column, ``[side ** 2, side ** 2]``."""
    table = axis_table(AxisRule(side, kernel), torch.device(device))
    seen = torch.zeros(side, side, dtype=torch.bool, device=device).scatter_(1, table.keys, table.valid)
    return (seen[:, None, :, None] & seen[None, :, None, :]).flatten(2).flatten(0, 1)


def compiled_flex(mask: Tensor, device: str) -> Callable[..., Tensor]:
    """FlexAttention with the same mask; it has no backward on a CPU."""

    def neighbors(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query, key]

    queries, keys = mask.shape
    block_mask = create_block_mask(neighbors, None, None, queries, keys, device=device)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)


def forward(method: Callable[..., Tensor], operands: list[Tensor]) -> None:
    with torch.no_grad():
        method(*operands)


def forward_backward(method: Callable[..., Tensor], operands: list[Tensor], cotangent: Tensor) -> None:
    leaves = [operand.detach().requires_grad_() for operand in operands]
    torch.autograd.grad(method(*leaves), leaves, cotangent)


def measure(case: Case, arguments: argparse.Namespace) -> list[tuple[Case, str, dict[str, Timing]]]:
    """Timings of both directions."""
    torch.compiler.reset()  # or the compiler would meet the next shape with a kernel for any shape
    found = methods(case, arguments.kernel_size, arguments.device, arguments.flex)
    check_agreement(found)
    clock = partial(interleaved, repeats=arguments.repeats, device=arguments.device)
    results = [(case, "forward", clock({name: partial(forward, *pair) for name, pair in found.items()}))]
    if arguments.device == "cpu":
        found.pop("compiled flex", None)
    training = {
        name: partial(forward_backward, *pair, torch.ones_like(pair[1][0])) for name, pair in found.items()
    }
    return [*results, (case, "forward + backward", clock(training))]


def check_agreement(found: dict[str, Method]) -> None:
    """All but plain dense attention compute the same thing."""
    with torch.no_grad():
        outputs = {
            name: method(*operands) for name, (method, operands) in found.items() if name != "plain dense"
        }
    for output in outputs.values():
        rows = output.flatten(1, 2).transpose(1, 2) if output.dim() == 5 else output
        torch.testing.assert_close(rows, outputs[BASELINE], atol=1e-4, rtol=1e-4)


def table(results: list[tuple[Case, str, dict[str, Timing]]]) -> str:
    """Milliseconds of the baseline, and how many times faster every method is, with quartiles."""
    names = list(dict.fromkeys(name for _, _, timings in results for name in timings if name != BASELINE))
    lines = [
        f"| map, heads x head_dim, batch | direction | {BASELINE} (ms) | " + " | ".join(names) + " |",
        "|---|---|---:|" + "---:|" * len(names),
    ]
    for case, direction, timings in results:
        base = timings[BASELINE]
        cells = [ratio(base, timings[name]) if name in timings else "" for name in names]
        lines.append(f"| {case} | {direction} | {milliseconds(base)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3g} ({timing.lower * 1e3:.3g} to {timing.upper * 1e3:.3g})"


def ratio(base: Timing, timing: Timing) -> str:
    low, high = base.median / timing.upper, base.median / timing.lower
    return f"{base.median / timing.median:.2f} ({low:.2f} to {high:.2f})"


def header(arguments: argparse.Namespace) -> str:
    """On what and how this was measured."""
    return f"""# Neighborhood attention, kernel size {arguments.kernel_size}, {arguments.device}

Speed relative to dense attention with a boolean mask (`scaled_dot_product_attention`): a ratio of 2 takes
half the time. Medians of {arguments.repeats} rounds; all methods take turns in one process, each after an
untimed call; in brackets the quartiles. float32. Plain dense attention computes something else and is shown
for comparison. FlexAttention has no backward on a CPU.

{machine(arguments.device)}, torch {torch.__version__}, {date.today()}.
"""


def machine(device: str) -> str:
    """Name of the processor, with threads on a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["56x4", "28x8", "14x16"], help="side x heads")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--flex", action=argparse.BooleanOptionalAction, default=True, help="compile FlexAttention"
    )
    parser.add_argument("--output", type=Path, help="write the table to this file, too")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    results: list[tuple[Case, str, dict[str, Timing]]] = []
    for size in arguments.sizes:
        side, heads = map(int, size.split("x"))
        for batch in arguments.batches:
            results += measure(Case(side, heads, batch), arguments)
            print(table(results[-2:]), flush=True)
    report = f"{header(arguments)}\n{table(results)}\n"
    print(report)
    if arguments.output:
        arguments.output.write_text(report)


if __name__ == "__main__":
    main()
