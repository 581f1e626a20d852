"""Convert the trained digit networks to every target, calibrate on 256 unlabeled images, and print a Markdown table.

python examples/calibration/table.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from digits import calibration_images, test_images, trained
from torch import Tensor, nn

import attnrewrite
from attnrewrite import AttnRewriteError
from attnrewrite.planning.registry import known_targets


@dataclass(frozen=True)
class Case:
    """A network, a target with its options, and how it is calibrated; ``title`` names it in the table."""

    network: str
    title: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("vit", "neighborhood 3", "neighborhood", {"kernel_size": 3}),
    Case("vit", "neighborhood 5", "neighborhood", {"kernel_size": 5}),
    Case("vit", "neighborhood 7", "neighborhood", {"kernel_size": 7}),
    Case("vit", "neighborhood 5, output projections only", "neighborhood", {"kernel_size": 5}, {"value_step": False}),
    Case("vit", "neighborhood 5, tokens unweighted", "neighborhood", {"kernel_size": 5}, {"token_weights": "uniform"}),
    Case("vit", "neighborhood 5, means only", "neighborhood", {"kernel_size": 5}, {"method": "bias"}),
    Case("vit", "neighborhood 5, distilled in 40 steps", "neighborhood", {"kernel_size": 5}, {"method": "distill"}),
    Case(
        "vit", 'neighborhood 5, keep="auto" at agreement 95 %', "neighborhood", {"kernel_size": 5},
        convert={"keep": "auto", "budget": {"agreement": 0.95}},
    ),
    Case("vit", "dilated neighborhood 3, dilation 3", "dilated_neighborhood", {"kernel_size": 3, "dilation": 3}),
    Case("vit", "aggregated 3, pooled 2 x 2", "aggregated", {"window_size": 3, "pool": 2}),
    Case("vit", "Manhattan, decayed by axis (decomposed), decay 0.9", "manhattan_decomposed", {"decay": 0.9}),
    Case("vit", "Manhattan, decay 0.8 after the softmax", "manhattan", {"decay": 0.8, "placement": "outside"}),
    Case("vit", "Manhattan, decay 0.8", "manhattan", {"decay": 0.8}),
    Case("vit", "long-short distance 5", "long_short_distance", {"group_size": 5}),
    Case("vit", "conv_glu at its own width (exact)", "conv_glu"),
    Case("vit", "conv_glu at two thirds of the width", "conv_glu", {"hidden": "match"}),
    Case("swin", "neighborhood, blocks kept (exact)", "neighborhood"),
    Case("swin", "neighborhood 7", "neighborhood", {"kernel_size": 7}),
    Case("swin", "long-short distance (exact)", "long_short_distance"),
    Case("swin", "long-short distance, shifted blocks long", "long_short_distance", {"shifted": "long"}),
    Case("swin", "aggregated 3, pooled 2 x 2", "aggregated", {"window_size": 3, "pool": 2}),
    Case("swin", "cross-scale stem and merges (exact)", "cross_scale"),
]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    print("| network | target | before: error / agreement / accuracy | after | seconds |\n|---|---|---|---|---|")
    for case in CASES:
        print(row(case), flush=True)


def row(case: Case) -> str:
    if case.target not in known_targets():
        return f"| {case.network} | {case.title} | there is no target {case.target!r} | | |"
    original, (images, labels) = trained(case.network), test_images(case.network)
    unlabeled = calibration_images(case.network)
    automatic: dict[str, Any] = {"measure": unlabeled} if case.convert else {}
    try:
        converted = attnrewrite.convert(
            original, case.target, unlabeled[:8], progress=False, **automatic, **case.convert, **case.options
        )
    except AttnRewriteError as refusal:
        return f"| {case.network} | {case.title} | refused: {str(refusal).splitlines()[0]} | | |"
    started = time.perf_counter()
    calibrated = attnrewrite.calibrate(converted, original, unlabeled, progress=False, **case.calibration)
    seconds = time.perf_counter() - started
    before, after = (cell(model, original, images, labels) for model in (converted, calibrated))
    return f"| {case.network} | {case.title} | {before} | {after} | {seconds:.0f} |"


@torch.no_grad()
def cell(model: nn.Module, original: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Relative error of the logits, agreement with the original and accuracy, on the test images."""
    actual, expected = model(images), original(images)
    error = (actual - expected).norm() / expected.norm()
    agreement = (actual.argmax(1) == expected.argmax(1)).float().mean()
    accuracy = (actual.argmax(1) == labels).float().mean()
    return f"{error:.2g} / {agreement:.1%} / {accuracy:.1%}"


if __name__ == "__main__":
    main()
