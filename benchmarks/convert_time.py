"""What ``convert``, certification included, costs beside its own ``torch.export`` calls and beside the model, in time
and memory.

    python benchmarks/convert_time.py --output docs/benchmarks/convert_time.md
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from measure import interleaved
from torch import Tensor, nn

import attnrewrite
from attnrewrite.capture import capture, other_looks, same_size_looks, training_look
from attnrewrite.hosts.loading import load_model

MODELS = (
    ("timm:swin_tiny_patch4_window7_224", 224),
    ("timm:vit_base_patch16_224", 224),
    ("timm:vit_small_patch16_224", 1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(*peaks_over_model(arguments.memory_of, arguments.size))
        return
    rows = [row(name, size, arguments.repeats) for name, size in MODELS]
    text = "\n".join(["# convert beside torch.export", "", heading(arguments), "", *TABLE, *rows, ""])
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


TABLE = (
    "| model | pixels | forward s | plain export s | own exports s | convert s | convert / own "
    "| (convert - own) / forward | peak memory / model | forward's |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def heading(arguments: argparse.Namespace) -> str:
    return (
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{date.today()}; medians of {arguments.repeats} interleaved repeats, one image. Own exports: with every "
        "module's boundary and every size recorded, in all sizes and modes that a conversion looks at. Memory: peak "
        "resident memory of a conversion, model and copy included, over the weights, and that of a forward pass of the "
        "model, model included: medians of three processes."
    )


def row(name: str, size: int, repeats: int) -> str:
    model, image = loaded(name, size)
    calls = {
        "forward": lambda: model(image),
        "plain": lambda: torch.export.export(model, (image,), strict=False),
        "own": lambda: exports(model, image),
        "convert": lambda: attnrewrite.convert(model, "neighborhood", image, progress=False),
    }
    with torch.no_grad():
        timings = interleaved(calls, repeats, "cpu")
    forward, plain, own, convert = (timings[key].median for key in ("forward", "plain", "own", "convert"))
    script = [sys.executable, __file__, "--memory-of", name, "--size", str(size)]
    runs = [subprocess.run(script, check=True, capture_output=True, text=True).stdout.split()[-2:] for _ in range(3)]
    passing, converting = (median(map(float, peaks)) for peaks in zip(*runs, strict=True))  # allocators differ by run
    seconds = f"{forward:.2f} | {plain:.2f} | {own:.2f} | {convert:.2f}"
    ratios = f"{convert / own:.2f} | {(convert - own) / forward:.2f}"
    return f"| {name} | {size} | {seconds} | {ratios} | {converting:.2f} | {passing:.2f} |"


def exports(model: nn.Module, image: Tensor) -> None:
    """The looks that a conversion takes at a model, as far as it takes them."""
    first = capture(model, image)
    others = other_looks(first)
    if not others:
        same_size_looks(first)
    for look in (first, *others[:1]):
        training_look(first, look)


def loaded(name: str, size: int = 224) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return load_model(name, img_size=size).eval(), torch.randn(1, 3, size, size)


def peaks_over_model(name: str, size: int) -> tuple[float, float]:
    """Peak resident memory of a forward pass, and of a conversion with its copy, model included, over the weights."""
    warm, image = loaded("timm:vit_tiny_patch16_224")
    attnrewrite.convert(warm, "neighborhood", image, progress=False)
    before = resident_bytes()
    model, image = loaded(name, size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        passing = peak_bytes(lambda: model(image))
    converting = peak_bytes(lambda: attnrewrite.convert(model, "neighborhood", image, progress=False))
    return (passing - before) / weights, (converting - before) / weights


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest resident memory while ``call`` runs."""
    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peak[0]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
