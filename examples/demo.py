"""Convert a Swin exactly, and a ViT of large images to neighborhood attention: cost, time and error before and after.

The weights are random, so the error is that of the operators and says nothing of accuracy.

make demo
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.hosts.loading import load_model


def main() -> None:
    torch.manual_seed(0)
    show("swin_tiny_patch4_window7_224", 224)
    show("vit_small_patch16_224", 768, kernel_size=7)


def show(name: str, side: int, **options: Any) -> None:
    model, image = load_model(f"timm:{name}", img_size=side).eval(), torch.randn(1, 3, side, side)
    started = time.perf_counter()
    converted = attnrewrite.convert(model, "neighborhood", image, **options)
    print(f"\n{name} at {side} pixels, converted in {time.perf_counter() - started:.1f} s")
    print(attnrewrite.report(converted))
    before, after = (attnrewrite.analyze(each, image).cost.macs for each in (model, converted))
    times = interleaved(model, converted, image)
    with torch.inference_mode():
        expected, found = model(image), converted(image)
    error = ((found - expected).norm() / expected.norm()).item()
    print(
        f"cost {before / 1e9:.2f} -> {after / 1e9:.2f} GMACs; "
        f"time {times[0] * 1e3:.0f} -> {times[1] * 1e3:.0f} ms per image (median, side by side); "
        f"error of the logits {error:.1e}"
    )
    print(attnrewrite.explain_lowering(converted, image))


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
