"""Convert a Swin and a ViT to neighborhood attention; print what happened, and cost and speed before and after.

make demo
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.hosts.loading import load_model


def main() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    show("swin_tiny_patch4_window7_224", image, {})
    show("vit_small_patch16_224", image, {"kernel_size": 7})


def show(name: str, image: Tensor, options: dict[str, int]) -> None:
    model = load_model(f"timm:{name}").eval()
    started = time.perf_counter()
    converted = attnrewrite.convert(model, "neighborhood", image, **options)
    print(f"\n{name} converted in {time.perf_counter() - started:.1f} s")
    print(attnrewrite.report(converted))
    before, after = (attnrewrite.analyze(each, image).cost.macs for each in (model, converted))
    times = interleaved(model, converted, image)
    print(
        f"cost {before / 1e9:.2f} -> {after / 1e9:.2f} GMACs; "
        f"time {times[0] * 1e3:.0f} -> {times[1] * 1e3:.0f} ms a {image.shape[-1]}-pixel image (median, side by side)"
    )


def interleaved(first: nn.Module, second: nn.Module, image: Tensor, repeats: int = 7) -> tuple[float, float]:
    """Median seconds of both, measured in turn so that a busy machine disturbs both alike."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats):
            for model, record in zip((first, second), seconds, strict=True):
                started = time.perf_counter()
                model(image)
                record.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
