"""What `convert`, certification included, costs beside its own `torch.export` call, in time and memory.

    python benchmarks/convert_time.py --output docs/benchmarks/convert_time.md
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import threading
from datetime import date
from pathlib import Path

import torch
from measure import interleaved
from torch import Tensor, nn

import attnrewrite
from attnrewrite.capture import capture
from attnrewrite.loading import load_model

MODELS = ("timm:swin_tiny_patch4_window7_224", "timm:vit_base_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_over_model(arguments.memory_of))
        return
    rows = [row(name, arguments.repeats) for name in MODELS]
    text = "\n".join(["# convert beside torch.export", "", heading(arguments), "", *TABLE, *rows, ""])
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


TABLE = (
    "| model | plain export s | own export s | convert s | convert / own | convert / plain | peak memory / model |",
    "|---|---|---|---|---|---|---|",
)


def heading(arguments: argparse.Namespace) -> str:
    return (
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{date.today()}; medians of {arguments.repeats} interleaved repeats. Own export: with every module's boundary "
        "recorded. Memory: peak resident memory, model and copy included, over the weights."
    )


def row(name: str, repeats: int) -> str:
    model, image = loaded(name)
    calls = {
        "plain": lambda: torch.export.export(model, (image,), strict=False),
        "own": lambda: capture(model, image),
        "convert": lambda: attnrewrite.convert(model, "neighborhood", image, progress=False),
    }
    with torch.no_grad():
        timings = interleaved(calls, repeats, "cpu")
    plain, own, convert = (timings[key].median for key in ("plain", "own", "convert"))
    script = [sys.executable, __file__, "--memory-of", name]
    memory = float(subprocess.run(script, check=True, capture_output=True, text=True).stdout.split()[-1])
    ratios = f"{convert / own:.2f} | {convert / plain:.2f}"
    return f"| {name} | {plain:.2f} | {own:.2f} | {convert:.2f} | {ratios} | {memory:.2f} |"


def loaded(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return load_model(name).eval(), torch.randn(1, 3, 224, 224)


def peak_over_model(name: str) -> float:
    """Peak resident memory of a conversion, model and converted copy included, over the weights."""
    warm, image = loaded("timm:vit_tiny_patch16_224")
    attnrewrite.convert(warm, "neighborhood", image, progress=False)
    before = resident_bytes()
    model, image = loaded(name)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    attnrewrite.convert(model, "neighborhood", image, progress=False)
    done.set()
    watcher.join()
    return (peak[0] - before) / weights


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
