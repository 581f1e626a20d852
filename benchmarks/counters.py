"""What counters say of the same models, and how long they take: fvcore, DeepSpeed's profiler and others if installed.

    python benchmarks/counters.py [--quick]

Every tool sees the same model at 224 x 224, batch 1, on the CPU, in evaluation mode, in one process. GMAC as reported,
FLOP halved. *exact* is equality with the published count to the integer. Times are of this process's CPU, the least of
three; for ``analyze`` once for the count alone and once with every formula, check and site.
"""

import argparse
import contextlib
import copy
import importlib
import io
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite import analyze, convert
from attnrewrite.hosts.loading import load_model

MODELS = {
    "ViT-S/16 timm": ("timm:vit_small_patch16_224", 4_598_882_304),
    "Swin-T timm": ("timm:swin_tiny_patch4_window7_224", 4_490_566_656),
    "PVTv2-B1 timm": ("timm:pvt_v2_b1", 2_108_355_584),
    "ViT-B/16 torchvision": ("torchvision:vit_b_16", 17_563_828_224),
    "Swin-T torchvision": ("torchvision:swin_t", 4_490_566_656),
    "ViT-B transformers": ("transformers:ViTForImageClassification", 17_563_828_224),
}
OPTIONS: dict[str, dict[str, Any]] = {"ViT-B transformers": {"num_labels": 1000}}
CONVERTED = ("ViT-S/16 timm", "Swin-T timm", "PVTv2-B1 timm")


def by_analyze(model: nn.Module, image: torch.Tensor) -> int:
    return analyze(model, image).total


def with_formulas(model: nn.Module, image: torch.Tensor) -> int:
    report = analyze(model, image)
    wrong = [str(check) for check in report.checks if not check.equal]
    if wrong or report.unsupported:
        print(f"    formulas: {'; '.join([*wrong, *map(str, report.unsupported)])}")
    return report.formula.macs(1, *report.size)


def by_torch_on_meta(model: nn.Module, image: torch.Tensor) -> int:
    meta = copy.deepcopy(model).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(image.to("meta"))
    return counter.get_total_flops() // 2


def by_torch_on_cpu(model: nn.Module, image: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def by_fvcore(model: nn.Module, image: torch.Tensor) -> int:
    counter = importlib.import_module("fvcore.nn").FlopCountAnalysis(model, image)
    return counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def by_deepspeed(model: nn.Module, image: torch.Tensor) -> int:
    profiler = importlib.import_module("deepspeed.profiling.flops_profiler")
    return profiler.get_model_profile(model, args=[image], print_profile=False, as_string=False, warm_up=0)[1]


def by_calflops(model: nn.Module, image: torch.Tensor) -> int:
    calculate = importlib.import_module("calflops").calculate_flops
    return calculate(model, tuple(image.shape), print_results=False, output_as_string=False)[1]


def by_thop(model: nn.Module, image: torch.Tensor) -> int:
    return int(importlib.import_module("thop").profile(copy.deepcopy(model), (image,), verbose=False)[0])


TOOLS: dict[str, Callable[[nn.Module, torch.Tensor], int]] = {
    "analyze, count": by_analyze,
    "analyze, formulas": with_formulas,
    "FlopCounterMode, meta": by_torch_on_meta,
    "FlopCounterMode, CPU": by_torch_on_cpu,
    "fvcore": by_fvcore,
    "DeepSpeed": by_deepspeed,
    "calflops": by_calflops,
    "thop": by_thop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two models, each tool once")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for name, (spec, expected) in list(MODELS.items())[: 2 if quick else None]:
        model = load_model(spec, **OPTIONS.get(name, {})).eval()
        compare(name, model, expected, 1 if quick else 3)
        if name in CONVERTED:
            converted = convert(model, to="neighborhood", progress=False)
            counted = by_torch_on_meta(converted, torch.zeros(1, 3, 224, 224))
            compare(f"{name}, converted to neighborhood attention", converted, counted, 1 if quick else 3)


def compare(name: str, model: nn.Module, expected: int, repeats: int) -> None:
    """Print one table. Of a converted model, what torch counts on meta is what all are compared with."""
    print(f"\n{name}\n{'tool':<24}{'GMAC':>10}  {'exact':<8}{'CPU s':>8}{'× analyze':>11}")
    image, base = torch.zeros(1, 3, 224, 224), None
    for tool, count in TOOLS.items():
        found = timed(count, model, image, repeats)
        if isinstance(found, str):
            print(f"{tool:<24}{found}")
            continue
        macs, seconds = found
        base = base or seconds
        verdict = "yes" if macs == expected else f"{100 * (macs / expected - 1):+.1f} %"
        print(f"{tool:<24}{macs / 1e9:>10.4f}  {verdict:<8}{seconds:>8.2f}{seconds / base:>11.1f}")


def timed(count: Callable, model: nn.Module, image: torch.Tensor, repeats: int) -> tuple[int, float] | str:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                macs = count(model, image)
        except ImportError:
            return "not installed"
        except Exception as cause:
            return f"fails: {str(cause).splitlines()[0][:80]}"
        times.append(time.process_time() - start)
    return int(macs), min(times)


if __name__ == "__main__":
    main()
