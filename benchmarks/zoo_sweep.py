"""Identity conversion of many small models: each comes out equal, or its sites are refused with a reason.

    python benchmarks/zoo_sweep.py --output docs/zoo.md
    python benchmarks/zoo_sweep.py --only "timm:swin*"

The models have random weights and reduced sizes; weights that their initialisation leaves too small to matter (zeros,
tiny layer scales, almost constant scores) are made larger first. They are converted with an example batch of
``--batch`` and compared with the original at that batch and at a batch of 3. A foreign exception or an output that
differs is a defect.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import math
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a model library: nothing is downloaded

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attnrewrite
from attnrewrite.torchvision_compat import ensure_torchvision

TOLERANCE = 2e-5
"""Greatest absolute error of an output relative to its greatest absolute value."""

SECONDS_A_MODEL = 300
OTHER_BATCH = 3


@dataclass(frozen=True)
class Case:
    """A model and the shape of one sample of its input; ``batch_axis`` is where the samples are stacked."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_axis: int = 0

    def inputs(self, batch: int) -> Tensor:
        shape = list(self.shape)
        shape.insert(self.batch_axis, batch)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


@dataclass(frozen=True)
class Row:
    """What became of one model."""

    model: str
    sites: str
    verdict: str
    error: float | None
    seconds: float

    @property
    def is_defect(self) -> bool:
        return self.verdict.startswith("DEFECT")

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"| {self.model} | {self.sites} | {error} | {self.seconds:.0f} | {self.verdict} |"


class TooSlow(BaseException):
    """A model took longer than ``SECONDS_A_MODEL``."""


def sweep(case: Case, batch: int) -> Row:
    """Convert one model and compare it with itself."""
    start = time.perf_counter()
    sites, error = "", None
    try:
        with _time_limit(SECONDS_A_MODEL):
            torch.manual_seed(0)
            try:
                model = enliven(case.build()).eval()
            except Exception as cause:
                return Row(case.name, "", f"not built: {_line(cause)}", None, time.perf_counter() - start)
            try:
                converted = attnrewrite.convert(
                    model, to="identity", example_inputs=case.inputs(batch), fidelity="exact", progress=False
                )
            except attnrewrite.AttnRewriteError as refusal:
                return Row(case.name, "", f"refused: {_line(refusal)}", None, time.perf_counter() - start)
            sites, verdict = _sites(converted)
            error, broken = compare(model, converted, case, batch)
            verdict = broken or verdict
    except TooSlow:
        verdict = f"no verdict within {SECONDS_A_MODEL} s"
    except Exception as foreign:
        verdict = f"DEFECT: {type(foreign).__name__}: {_line(foreign)}"
    return Row(case.name, sites, verdict, error, time.perf_counter() - start)


def compare(model: nn.Module, converted: nn.Module, case: Case, batch: int) -> tuple[float | None, str]:
    """The worst relative error, and what is wrong (an empty string: nothing)."""
    errors: list[float] = []
    for size in (batch, OTHER_BATCH):
        inputs = case.inputs(size)
        expected = outputs(model, inputs)
        if expected is None:  # the original takes no other batch: there is nothing to compare with
            continue
        try:
            with torch.no_grad():
                actual = _tensors(converted(inputs))
        except Exception as foreign:
            return None, f"DEFECT: at a batch of {size}: {type(foreign).__name__}: {_line(foreign)}"
        if [value.shape for value in actual] != [value.shape for value in expected]:
            return None, f"DEFECT: at a batch of {size} the outputs have other shapes"
        errors += [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    error = max(errors, default=math.nan)
    if error <= TOLERANCE:
        return error, ""
    exact, rounding = in_double(model, converted, case.inputs(OTHER_BATCH))
    if exact <= 1e-9:
        return error, f"equal in float64 ({exact:.0e}); float32 rounds the original's own output by {rounding:.1e}"
    return error, f"DEFECT: wrong by {error:.1e} ({exact:.1e} in float64)"


def in_double(model: nn.Module, converted: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """The relative error in float64, and that of the original's own float32 output."""
    twins = [copy.deepcopy(each).double() for each in (model, converted)]
    single = outputs(model, inputs)
    expected, actual = (outputs(twin, inputs.double()) for twin in twins)
    if single is None or expected is None or actual is None:
        return math.inf, math.nan
    exact = max(map(relative_error, actual, expected))
    return exact, max(relative_error(s.double(), e) for s, e in zip(single, expected, strict=True))


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor] | None:
    """What the model computes, or None where it does not run."""
    try:
        with torch.no_grad():
            return _tensors(model(inputs))
    except Exception:
        return None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Greatest absolute error relative to the greatest absolute value; infinite where either is not finite."""
    if not bool(expected.isfinite().all() & actual.isfinite().all()):
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def enliven(model: nn.Module) -> nn.Module:
    """Make every weight matter: noise instead of zeros and constants, unit gain instead of almost constant scores."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point():
                _enliven(parameter, generator)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.add_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model


def _enliven(parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.abs().max() < 1e-2 or bool((parameter == parameter.flatten()[0]).all()):
        parameter.add_(0.1 * noise)
    elif parameter.ndim == 2 and (gain := float(parameter.std()) * math.sqrt(parameter.shape[1])) < 1.0:
        parameter.div_(gain)


def _sites(converted: nn.Module) -> tuple[str, str]:
    """Sites by kind and status, and the verdict that they amount to."""
    rows = attnrewrite.report(converted).sites
    counts = Counter((row.kind, row.status) for row in rows)
    sites = ", ".join(f"{count} {kind} {status}" for (kind, status), count in sorted(counts.items()))
    reasons = Counter(row.why for row in rows if row.status == "refused")
    listed = "; ".join(f"{count}× {_line(reason)}" for reason, count in reasons.items())
    return sites, f"equal; refused: {listed}" if listed else "equal"


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _line(reason: object) -> str:
    text = " ".join(str(reason).split()).replace("|", "/")
    text = re.sub(r"(?:[A-Za-z]:)?(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# Models of timm: name (or module and class), variant, side of the image, arguments that make it small.

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL_VIT = {**VIT, "img_size": 64, "patch_size": 16}
STAGES = {"depths": (1, 1, 1, 1)}

TIMM: list[tuple[str, str, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", "", 64, SMALL_VIT),
    ("vit_tiny_patch16_224", "qk_norm", 64, {**SMALL_VIT, "qk_norm": True}),
    ("vit_tiny_patch16_224", "no bias", 64, {**SMALL_VIT, "qkv_bias": False, "proj_bias": False}),
    ("vit_tiny_patch16_224", "layer scale, registers", 64, {**SMALL_VIT, "init_values": 1e-5, "reg_tokens": 4}),
    ("vit_tiny_patch16_224", "rectangular", 64, {**SMALL_VIT, "patch_size": (16, 8)}),
    ("vit_tiny_patch16_224", "dynamic image size", 64, {**SMALL_VIT, "dynamic_img_size": True}),
    (
        "vit_tiny_patch16_224",
        "padded image",
        60,
        {**SMALL_VIT, "img_size": 60, "dynamic_img_size": True, "dynamic_img_pad": True},
    ),
    ("vit_tiny_patch16_224", "average pool", 64, {**SMALL_VIT, "class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", "map pool", 64, {**SMALL_VIT, "class_token": False, "global_pool": "map"}),
    ("vit_betwixt_patch16_reg4_gap_256", "", 64, SMALL_VIT),
    ("vit_wee_patch16_reg1_gap_256", "", 64, SMALL_VIT),
    ("vit_pwee_patch16_reg1_gap_256", "", 64, SMALL_VIT),
    ("vit_dpwee_patch16_reg1_gap_256", "", 64, SMALL_VIT),
    ("vit_dlittle_patch16_reg1_gap_256", "", 64, SMALL_VIT),
    ("vit_small_patch16_18x2_224", "", 64, SMALL_VIT),
    ("vit_base_patch16_siglip_224", "", 64, SMALL_VIT),
    ("vit_base_patch16_clip_quickgelu_224", "", 64, SMALL_VIT),
    ("vit_intern300m_patch14_448", "", 64, SMALL_VIT),
    ("vit_giant_patch14_dinov2", "", 64, SMALL_VIT),
    ("aimv2_large_patch14_224", "", 64, SMALL_VIT),
    ("beit3_base_patch16_224", "", 64, SMALL_VIT),
    ("vit_tiny_r_s16_p8_224", "", 64, {**VIT, "img_size": 64}),
    ("test_vit", "", 160, {}),
    ("test_vit2", "", 160, {}),
    ("test_vit3", "", 160, {}),
    ("test_vit4", "", 160, {}),
    ("vit_relpos_small_patch16_224", "", 64, SMALL_VIT),
    ("vit_relpos_base_patch16_cls_224", "", 64, SMALL_VIT),
    ("vit_relpos_base_patch16_clsgap_224", "", 64, SMALL_VIT),
    ("vit_relpos_small_patch16_rpn_224", "", 64, SMALL_VIT),
    ("vit_srelpos_small_patch16_224", "", 64, SMALL_VIT),
    ("flexivit_small", "", 64, SMALL_VIT),
    ("naflexvit_base_patch16_gap", "", 64, VIT),
    ("naflexvit_base_patch16_map", "", 64, VIT),
    ("deit_tiny_patch16_224", "", 64, SMALL_VIT),
    ("deit_tiny_distilled_patch16_224", "", 64, SMALL_VIT),
    ("deit3_small_patch16_224", "", 64, SMALL_VIT),
    ("cait_xxs24_224", "", 64, SMALL_VIT),
    ("beit_base_patch16_224", "", 64, SMALL_VIT),
    (
        "beit_base_patch16_224",
        "shared bias",
        64,
        {**SMALL_VIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    ("beitv2_base_patch16_224", "", 64, SMALL_VIT),
    ("eva_giant_patch14_224", "", 64, SMALL_VIT),
    ("eva02_tiny_patch14_224", "", 64, SMALL_VIT),
    ("eva02_base_patch14_224", "", 64, SMALL_VIT),
    ("vit_medium_patch16_rope_reg1_gap_256", "", 64, SMALL_VIT),
    ("vit_small_patch16_rope_mixed_ape_224", "", 64, SMALL_VIT),
    ("vit_pe_core_tiny_patch16_384", "", 64, SMALL_VIT),
    ("vit_small_patch16_dinov3", "", 64, SMALL_VIT),
    ("vit_7b_patch16_dinov3", "", 64, SMALL_VIT),
    ("samvit_base_patch16", "", 128, {**SMALL_VIT, "img_size": 128, "window_size": 3, "global_attn_indexes": (1,)}),
    ("vitamin_small_224", "", 64, {"img_size": 64, "depth": 2}),
    ("gemma4_vit_167m", "", 64, VIT),
    ("qwen3_vit_88m", "", 64, VIT),
    ("deepseek_vit_412m", "", 56, VIT),
    ("swin_tiny_patch4_window7_224", "", 64, {**STAGES, "img_size": 64, "embed_dim": 24, "window_size": 4}),
    (
        "swin_tiny_patch4_window7_224",
        "two blocks",
        112,
        {"depths": (2, 2), "num_heads": (3, 6), "img_size": 112, "embed_dim": 24},
    ),
    (
        "swin_tiny_patch4_window7_224",
        "padded",
        72,
        {"depths": (2, 2), "num_heads": (3, 6), "img_size": 72, "embed_dim": 24},
    ),
    ("swin_s3_tiny_224", "", 224, {"embed_dim": 24, "depths": (2, 1, 2, 1)}),
    ("swinv2_tiny_window8_256", "", 64, {"depths": (2, 2, 1, 1), "img_size": 64, "embed_dim": 24, "window_size": 4}),
    ("swinv2_cr_tiny_224", "", 64, {"depths": (2, 2, 1, 1), "img_size": 64, "embed_dim": 24, "window_size": 4}),
    ("swinv2_cr_tiny_ns_224", "", 64, {"depths": (2, 2, 1, 1), "img_size": 64, "embed_dim": 24, "window_size": 4}),
    ("pvt_v2_b0", "", 64, STAGES),
    ("pvt_v2_b2_li", "", 64, {**STAGES, "embed_dims": (16, 32, 40, 64)}),
    ("twins_pcpvt_small", "", 64, {"img_size": 64, **STAGES}),
    ("twins_svt_small", "", 224, {"depths": (2, 2, 2, 1)}),
    ("crossvit_9_240", "", 240, {"depth": ((1, 1, 0),)}),
    ("crossvit_9_dagger_240", "", 240, {"depth": ((1, 1, 0),)}),
    ("coat_lite_tiny", "", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    ("coat_tiny", "", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    ("coatnet_pico_rw_224", "", 64, {"img_size": 64}),
    ("coatnet_nano_cc_224", "", 64, {"img_size": 64}),
    ("coatnet_bn_0_rw_224", "", 64, {"img_size": 64}),
    ("coatnext_nano_rw_224", "", 64, {"img_size": 64}),
    ("maxvit_pico_rw_256", "", 64, {"img_size": 64}),
    ("maxvit_rmlp_pico_rw_256", "", 64, {"img_size": 64}),
    ("maxvit_tiny_pm_256", "", 64, {"img_size": 64}),
    ("maxvit_tiny_tf_224", "", 224, {"img_size": 224}),
    ("maxxvit_rmlp_nano_rw_256", "", 64, {"img_size": 64}),
    ("maxxvitv2_nano_rw_256", "", 64, {"img_size": 64}),
    ("levit_128s", "", 224, {}),
    ("levit_conv_128s", "", 224, {}),
    ("tnt_s_patch16_224", "", 64, {"img_size": 64, "depth": 2}),
    ("tnt_s_legacy_patch16_224", "", 64, {"img_size": 64, "depth": 2}),
    ("visformer_tiny", "", 64, {"img_size": 64, "depth": (2, 2, 2)}),
    (
        "volo.VOLO",
        "",
        64,
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 3, 3, 3)},
    ),
    ("xcit_nano_12_p16_224", "", 64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    ("xcit_tiny_12_p8_224", "", 64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    ("mvitv2_tiny", "", 64, {"img_size": (64, 64)}),
    ("mvitv2_base_cls", "", 64, {"img_size": (64, 64)}),
    ("pit_ti_224", "", 64, {"img_size": 64, "depth": (1, 2, 1)}),
    ("pit_s_distilled_224", "", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    (
        "nest.Nest",
        "",
        64,
        {"img_size": 64, "num_levels": 2, "embed_dims": (24, 48), "num_heads": (2, 4), "depths": (1, 2)},
    ),
    (
        "gcvit.GlobalContextVit",
        "",
        64,
        {
            "img_size": 64,
            "embed_dim": 16,
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 2, 4, 8),
            "window_ratio": (16, 16, 16, 32),
        },
    ),
    ("gcvit_xxtiny", "", 224, {}),
    ("davit_tiny", "", 64, STAGES),
    ("edgenext_xx_small", "", 64, {"depths": (1, 2, 2, 2)}),
    ("edgenext_small_rw", "", 64, {"depths": (1, 2, 2, 2)}),
    ("efficientformer_l1", "", 224, {"depths": (1, 1, 1, 2)}),
    ("efficientformerv2_s0", "", 224, {"depths": (1, 1, 3, 3)}),
    ("fastvit_sa12", "", 64, {"layers": (1, 1, 1, 2)}),
    ("fastvit_mci0", "", 64, {"layers": (1, 1, 1, 2)}),
    ("vit_base_mci_224", "", 64, {"depth": 2, "img_size": 64}),
    ("hiera_tiny_224", "", 224, {"embed_dim": 24, "stages": (1, 1, 2, 1)}),
    ("hiera_small_abswin_256", "", 256, {"embed_dim": 24, "stages": (1, 1, 2, 1)}),
    ("hieradet_small", "", 256, {"embed_dim": 24, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)}),
    ("sam2_hiera_tiny", "", 256, {"embed_dim": 24, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)}),
    ("mobilevit_xxs", "", 64, {}),
    ("mobilevitv2_050", "", 64, {}),
    ("mobilenetv4_hybrid_medium", "", 64, {}),
    ("mobilenetv5_base", "", 64, {}),
    ("poolformer_s12", "", 64, {}),
    ("caformer_s18", "", 64, {}),
    ("convformer_s18", "", 64, {}),
    ("nextvit_small", "", 64, {"depths": (1, 2, 5, 2)}),
    ("repvit_m0_9", "", 64, {}),
    ("rdnet_tiny", "", 64, {}),
    ("sequencer2d_s", "", 64, {"layers": (1, 1, 1, 1), "img_size": 64}),
    ("tiny_vit_5m_224", "", 224, {"depths": (1, 1, 2, 1)}),
    ("tiny_vit_5m_224", "padded", 96, {"depths": (1, 1, 2, 1)}),
    ("efficientvit_m0", "", 224, {}),
    ("efficientvit_b0", "", 64, {}),
    ("efficientvit_l1", "", 64, {}),
    ("efficientvim_m1", "", 64, {}),
    ("convit_tiny", "", 64, {"img_size": 64, "depth": 3, "local_up_to_layer": 2}),
    ("botnet26t_256", "", 64, {"img_size": 64}),
    ("eca_botnext26ts_256", "", 64, {"img_size": 64}),
    ("halonet26t", "", 256, {}),
    ("sehalonet33ts", "", 256, {}),
    ("lambda_resnet26t", "", 64, {}),
    ("lambda_resnet26rpt_256", "", 64, {"img_size": 64}),
    ("haloregnetz_b", "", 224, {}),
    ("bat_resnext26ts", "", 256, {}),
    ("gcresnet33ts", "", 64, {}),
    ("starnet_s050", "", 64, {}),
    ("iformer_t", "", 64, {}),
    ("shvit_s1", "", 128, {}),
    ("lowformer_b0", "", 64, {}),
    ("cpubone_b0_bfrobust", "", 64, {}),
    ("csatv2", "", 512, {}),
    ("focalnet_tiny_srf", "", 64, {}),
    ("swiftformer_xs", "", 64, {}),
    ("mixer_s32_224", "", 64, {"img_size": 64}),
    ("gmlp_ti16_224", "", 64, {"img_size": 64}),
    ("gmixer_12_224", "", 64, {"img_size": 64}),
    ("resmlp_12_224", "", 64, {"img_size": 64}),
    ("mambaout_femto", "", 64, STAGES),
    ("convnext_atto", "", 64, STAGES),
    ("inception_next_atto", "", 64, STAGES),
    ("resnet50_clip", "", 64, {}),
]


def timm_cases() -> list[Case]:
    def case(name: str, variant: str, side: int, options: dict[str, Any]) -> Case:
        def build() -> nn.Module:
            module, _, model_class = name.rpartition(".")
            if module:
                return getattr(importlib.import_module(f"timm.models.{module}"), model_class)(num_classes=10, **options)
            return importlib.import_module("timm").create_model(name, num_classes=10, **options)

        return Case(f"timm:{name}" + (f" ({variant})" if variant else ""), build, (3, side, side))

    return [case(*entry) for entry in TIMM]


def torchvision_cases() -> list[Case]:
    def swin(block: str, side: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            swin_module = importlib.import_module("torchvision.models.swin_transformer")
            merging = swin_module.PatchMergingV2 if block.endswith("V2") else swin_module.PatchMerging
            return swin_module.SwinTransformer(
                [4, 4], 24, [2, 2], [3, 6], [side, side], num_classes=10,
                block=getattr(swin_module, block), downsample_layer=merging,
            )  # fmt: skip

        return build

    def vit() -> nn.Module:
        vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
        return vision_transformer.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=10)

    def maxvit() -> nn.Module:
        maxvit_module = importlib.import_module("torchvision.models.maxvit")
        return maxvit_module.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)

    return [
        Case("torchvision:vit", vit, (3, 64, 64)),
        Case("torchvision:swin", swin("SwinTransformerBlock", 4), (3, 64, 64)),
        Case("torchvision:swin (padded)", swin("SwinTransformerBlock", 7), (3, 64, 64)),
        Case("torchvision:swin_v2", swin("SwinTransformerBlockV2", 4), (3, 64, 64)),
        Case("torchvision:swin_v2 (padded)", swin("SwinTransformerBlockV2", 7), (3, 64, 64)),
        Case("torchvision:maxvit", maxvit, (3, 64, 64)),
    ]


# Models of transformers: class, variant, side of the image, what its configuration is reduced to.

HF_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
}
HF_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "image_size": 64}
HF_ONE = {"depths": [1, 1, 1, 1]}

TRANSFORMERS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("ViTForImageClassification", "sdpa", 64, {**HF_VIT, "attn_implementation": "sdpa"}),
    ("ViTForImageClassification", "eager", 64, {**HF_VIT, "attn_implementation": "eager"}),
    ("ViTModel", "", 64, HF_VIT),
    ("DeiTForImageClassification", "", 64, HF_VIT),
    ("DeiTForImageClassificationWithTeacher", "", 64, HF_VIT),
    ("BeitForImageClassification", "", 64, {**HF_VIT, "use_relative_position_bias": True}),
    ("BeitForImageClassification", "shared bias", 64, {**HF_VIT, "use_shared_relative_position_bias": True}),
    ("Data2VecVisionForImageClassification", "", 64, {**HF_VIT, "use_relative_position_bias": True}),
    ("Dinov2ForImageClassification", "", 64, {**HF_VIT, "patch_size": 16}),
    ("Dinov2ForImageClassification", "swiglu", 64, {**HF_VIT, "patch_size": 16, "use_swiglu_ffn": True}),
    ("Dinov2WithRegistersForImageClassification", "", 64, {**HF_VIT, "patch_size": 16}),
    ("DINOv3ViTModel", "", 64, {**HF_VIT, "num_register_tokens": 4}),
    ("IJepaForImageClassification", "", 64, HF_VIT),
    ("ViTMSNForImageClassification", "", 64, HF_VIT),
    ("ViTMAEModel", "", 64, {**HF_VIT, "mask_ratio": 0.0}),
    (
        "VitDetModel",
        "",
        64,
        {**HF_VIT, "use_relative_position_embeddings": True, "window_block_indices": [0], "window_size": 3},
    ),
    ("YolosForObjectDetection", "", 64, {**HF_VIT, "image_size": [64, 64], "num_detection_tokens": 5}),
    (
        "DPTForSemanticSegmentation",
        "",
        64,
        {
            **HF_VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
    ),
    ("CLIPVisionModel", "", 64, {**HF_VIT, "patch_size": 16}),
    ("SiglipVisionModel", "", 64, HF_VIT),
    ("Aimv2VisionModel", "", 64, {**HF_VIT, "patch_size": 16}),
    ("SwinForImageClassification", "sdpa", 64, {**HF_SWIN, "attn_implementation": "sdpa"}),
    ("SwinForImageClassification", "eager", 64, {**HF_SWIN, "attn_implementation": "eager"}),
    ("SwinForImageClassification", "padded", 64, {**HF_SWIN, "window_size": 7}),
    ("Swinv2ForImageClassification", "", 64, HF_SWIN),
    ("Swinv2ForImageClassification", "padded", 64, {**HF_SWIN, "window_size": 7}),
    ("DonutSwinForImageClassification", "", 64, HF_SWIN),
    ("FocalNetForImageClassification", "", 64, {"embed_dim": 24, "depths": [1, 1, 1, 1], "image_size": 64}),
    ("PvtForImageClassification", "", 64, {**HF_ONE, "image_size": 64}),
    ("PvtV2ForImageClassification", "", 64, {**HF_ONE, "image_size": 64}),
    ("PvtV2ForImageClassification", "linear", 64, {**HF_ONE, "image_size": 64, "linear_attention": True}),
    ("SegformerForImageClassification", "", 64, HF_ONE),
    ("SegformerForSemanticSegmentation", "", 64, HF_ONE),
    ("GLPNForDepthEstimation", "", 64, HF_ONE),
    ("CvtForImageClassification", "", 64, {"depth": [1, 2, 3]}),
    ("LevitForImageClassification", "", 224, {"depths": [1, 1, 1]}),
    ("MobileViTForImageClassification", "", 64, {"image_size": 64}),
    ("MobileViTV2ForImageClassification", "", 64, {"image_size": 64, "width_multiplier": 0.5}),
    ("PoolFormerForImageClassification", "", 64, HF_ONE),
    ("SwiftFormerForImageClassification", "", 224, HF_ONE),
    ("HieraForImageClassification", "", 224, {**HF_ONE, "embed_dim": 24, "num_heads": [1, 2, 4, 8]}),
    ("Sam2HieraDetModel", "", 256, {}),
    ("PoolFormerModel", "", 64, HF_ONE),
    ("ConvNextForImageClassification", "", 64, HF_ONE),
]


def transformers_cases() -> list[Case]:
    def case(name: str, variant: str, side: int, options: dict[str, Any]) -> Case:
        def build() -> nn.Module:
            transformers = importlib.import_module("transformers")
            model = getattr(transformers, name)
            chosen = dict(options)
            implementation = chosen.pop("attn_implementation", None)
            config = model.config_class(**chosen)
            config.num_labels = 10
            return model._from_config(config, **({"attn_implementation": implementation} if implementation else {}))

        return Case(f"transformers:{name}" + (f" ({variant})" if variant else ""), build, (3, side, side))

    return [case(*entry) for entry in TRANSFORMERS]


# Attention as users write it. Every one maps [batch, tokens, width] tokens (or a [batch, width, side, side] map).

WIDTH, HEADS, SIDE = 24, 3, 8
HEAD_DIM = WIDTH // HEADS
Mixer = Callable[[], nn.Module]


class Block(nn.Module):
    """A residual block around a token mixer."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), mixer
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Patches, blocks, mean, logits. ``prefix`` and ``suffix`` tokens surround the patches."""

    def __init__(self, *blocks: nn.Module, prefix: int = 1, suffix: int = 0, sequence_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.first = nn.Parameter(torch.randn(1, prefix, WIDTH))
        self.last = nn.Parameter(torch.randn(1, suffix, WIDTH))
        self.position = nn.Parameter(torch.randn(1, prefix + SIDE * SIDE + suffix, WIDTH))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, 10)
        self.sequence_first = sequence_first

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        first, last = (extra.expand(x.shape[0], -1, -1) for extra in (self.first, self.last))
        x = torch.cat([first, x, last], dim=1) + self.position
        if self.sequence_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(0 if self.sequence_first else 1))


class MapClassifier(nn.Module):
    """The same on a channels-first map, without extra tokens."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixers, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.ModuleList(mixers), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x.mean((2, 3)))


class Packed(nn.Module):
    """Packed projections, heads laid out as ``order`` (3hd, h3d, hd3); ``scale`` says where the scale acts."""

    def __init__(self, order: str = "3hd", scale: str = "scores", stable: bool = False, talking: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.order, self.scale, self.stable = order, scale, stable
        self.talk = nn.Parameter(torch.eye(HEADS) + 0.3 * torch.randn(HEADS, HEADS)) if talking else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.scale == "k":
            scores = q @ (k * HEAD_DIM**-0.5).transpose(-2, -1)
        elif self.scale == "division":
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
        else:
            scores = (q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5
        if self.talk is not None:
            scores = torch.einsum("bhij,hg->bgij", scores, self.talk)
        if self.stable:
            scores = scores - scores.amax(-1, keepdim=True)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        else:
            weights = scores.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        packed = self.qkv(x)
        if self.order == "3hd":
            q, k, v = packed.reshape(batch, tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        elif self.order == "h3d":
            q, k, v = packed.reshape(batch, tokens, HEADS, 3, HEAD_DIM).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = packed.reshape(batch, tokens, HEADS, HEAD_DIM, 3).permute(4, 0, 2, 1, 3)
        return q, k, v


class MaximumSubtracted(Packed):
    """A softmax after the maximum is subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * HEAD_DIM**-0.5
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Separate projections, products as einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, HEAD_DIM)) for part in (self.q, self.k, self.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(HEAD_DIM**-0.5).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class KeyValuePacked(nn.Module):
    """A query projection and a packed one for keys and values; fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MultiQuery(nn.Module):
    """Many query heads, one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * HEAD_DIM), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """``nn.MultiheadAttention`` as it comes."""

    def __init__(self, batch_first: bool, need_weights: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Masked(Packed):
    """A mask of the model's own: ``masked_fill``, or a boolean or additive mask of fused attention."""

    hidden: Tensor

    def __init__(self, how: str, tokens: int = SIDE * SIDE + 1) -> None:
        super().__init__()
        reach = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
        self.register_buffer("hidden", reach > 20)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.how == "fill":
            scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(self.hidden, float("-inf"))
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if self.how == "causal":
            return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        mask = ~self.hidden if self.how == "boolean" else -3.0 * self.hidden.float()
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class ContentMasked(Packed):
    """A mask that the input decides."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        hidden = (x.mean(-1) > x.mean((1, 2))[:, None] + 0.1)[:, None, None]
        scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -1e4)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AcrossSamples(Packed):
    """Attention over all tokens of the whole batch: no sample stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)[None]).reshape(x.shape)


class SoftmaxOverQueries(Packed):
    """The softmax runs over the queries, not over the keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(-2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ChannelAttention(Packed):
    """Attention between channels, normalised, as in XCiT."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in self.heads(x))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 4.0).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


class ChannelsFirst(nn.Linear):
    """A linear map of the channels of a channels-first map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Shifted windows on a channels-first map, written as einops would."""

    mask: Tensor

    def __init__(self, size: int = 4, shift: int = 0, linear: bool = True) -> None:
        super().__init__()
        self.qkv: nn.Module = ChannelsFirst(WIDTH, 3 * WIDTH) if linear else nn.Conv2d(WIDTH, 3 * WIDTH, 1)
        self.proj: nn.Module = ChannelsFirst(WIDTH, WIDTH) if linear else nn.Conv2d(WIDTH, WIDTH, 1)
        self.bias = nn.Parameter(torch.randn(HEADS, size * size, size * size))
        self.size, self.shift = size, shift
        self.register_buffer("mask", self.shift_mask() if shift else None, persistent=False)

    def shift_mask(self) -> Tensor:
        region = torch.zeros(SIDE)
        region[-self.size : -self.shift] = 1
        region[-self.shift :] = 2
        rows = (3 * region[:, None] + region).view(SIDE // self.size, self.size, SIDE // self.size, self.size)
        blocks = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return torch.where(blocks[:, :, None] == blocks[:, None], 0.0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (2, 3))
        rows, columns = height // self.size, width // self.size
        q, k, v = (
            self.qkv(x)
            .reshape(batch, 3, HEADS, HEAD_DIM, rows, self.size, columns, self.size)
            .permute(1, 0, 4, 6, 2, 5, 7, 3)
            .reshape(3, batch, rows * columns, HEADS, self.size**2, HEAD_DIM)
        )
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5 + self.bias
        if self.shift:
            scores = scores + self.mask[:, None]
        x = (scores.softmax(-1) @ v).reshape(batch, rows, columns, HEADS, self.size, self.size, HEAD_DIM)
        x = x.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, WIDTH, height, width)
        return self.proj(x.roll((self.shift, self.shift), (2, 3)) if self.shift else x)


class Unfolded(nn.Module):
    """Windows, or with ``reach`` overlapping neighbourhoods, cut by ``unfold``."""

    def __init__(self, size: int, reach: int = 0) -> None:
        super().__init__()
        self.qkv, self.proj = ChannelsFirst(WIDTH, 3 * WIDTH), ChannelsFirst(WIDTH, WIDTH)
        self.size, self.reach = size, reach

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        q = self.cut(q, 0)
        k, v = self.cut(k, self.reach), self.cut(v, self.reach)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [batch, heads, blocks, places, dim]
        columns = mixed.permute(0, 1, 4, 3, 2).reshape(x.shape[0], WIDTH * self.size**2, -1)
        return self.proj(F.fold(columns, x.shape[2:], self.size, stride=self.size))

    def cut(self, x: Tensor, reach: int) -> Tensor:
        columns = F.unfold(x, self.size + 2 * reach, padding=reach, stride=self.size)
        return columns.unflatten(1, (HEADS, HEAD_DIM, -1)).permute(0, 1, 4, 3, 2)


class MapAttention(nn.Module):
    """Attention over all pixels of a channels-first map with 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        weights = torch.einsum("bhdi,bhdj->bhij", q, k).div(HEAD_DIM**0.5).softmax(-1)
        mixed = torch.einsum("bhij,bhdj->bhdi", weights, v)
        return self.proj(mixed.reshape(x.shape))


class Axial(nn.Module):
    """Attention along the rows, then along the columns, of a channels-first map."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = Packed(), Packed()

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = x.permute(0, 2, 3, 1)
        x = self.rows(x.reshape(batch * height, width, WIDTH)).reshape(batch, height, width, WIDTH)
        x = self.columns(x.transpose(1, 2).reshape(batch * width, height, WIDTH)).reshape(batch, width, height, WIDTH)
        return x.permute(0, 3, 2, 1)


class Transposed(nn.Module):
    """Gives a mixer its tokens and samples the wrong way round, and turns its result back."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.transpose(0, 1)).transpose(0, 1)


class Reused(nn.Module):
    """One block called twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Pooled(nn.Module):
    """Keys and values from an average-pooled map, a class token kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        image = x[:, 1:].transpose(1, 2).unflatten(2, (SIDE, SIDE))
        reduced = torch.cat([x[:, :1], F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)], dim=1)
        k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.kv(reduced).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Selected(Packed):
    """Every query attends to its own best keys only."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT * HEAD_DIM**-0.5
        least = scores.topk(8, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, activation="gelu", **options)


def handwritten_cases() -> list[Case]:
    def tied() -> nn.Module:
        block = Block(Packed())
        return Classifier(block, block)

    def tokens(mixer: Mixer, **options: Any) -> Callable[[], nn.Module]:
        return lambda: Classifier(Block(mixer()), Block(mixer()), **options)

    def maps(*mixers: Mixer) -> Callable[[], nn.Module]:
        return lambda: MapClassifier(*(mixer() for mixer in mixers))

    builders: dict[str, Callable[[], nn.Module]] = {
        "packed 3·h·d": tokens(Packed),
        "packed h·3·d": tokens(lambda: Packed("h3d")),
        "packed (h d 3)": tokens(lambda: Packed("hd3")),
        "scale on k": tokens(lambda: Packed(scale="k")),
        "scores divided": tokens(lambda: Packed(scale="division")),
        "maximum subtracted": tokens(MaximumSubtracted),
        "softmax by hand": tokens(lambda: Packed(stable=True)),
        "talking heads": tokens(lambda: Packed(talking=True)),
        "einsum": tokens(Einsum),
        "key and value packed": tokens(KeyValuePacked),
        "multi-query": tokens(MultiQuery),
        "MultiheadAttention batch first": tokens(lambda: Torch(True)),
        "MultiheadAttention batch first, no weights": tokens(lambda: Torch(True, False)),
        "MultiheadAttention sequence first": tokens(lambda: Torch(False, False), sequence_first=True),
        "MultiheadAttention sequence first, misused": tokens(lambda: Torch(False)),
        "MultiheadAttention batch first, misused": tokens(lambda: Torch(True), sequence_first=True),
        "sequence first, turned round": tokens(lambda: Transposed(Torch(False, False))),
        "attention over [N, B, C]": tokens(lambda: Transposed(Packed())),
        "attention over [N, B, C] from [N, B, C]": tokens(lambda: Transposed(Packed()), sequence_first=True),
        "TransformerEncoderLayer": lambda: Classifier(encoder_layer(batch_first=True), encoder_layer(batch_first=True)),
        "TransformerEncoderLayer norm first": lambda: Classifier(encoder_layer(batch_first=True, norm_first=True)),
        "TransformerEncoderLayer sequence first": lambda: Classifier(encoder_layer(), sequence_first=True),
        "TransformerEncoder": lambda: Classifier(
            nn.TransformerEncoder(encoder_layer(batch_first=True), 2, enable_nested_tensor=False)
        ),
        "TransformerEncoderLayer misused": lambda: Classifier(encoder_layer()),
        "masked_fill": tokens(lambda: Masked("fill")),
        "boolean mask": tokens(lambda: Masked("boolean")),
        "additive mask": tokens(lambda: Masked("additive")),
        "causal": tokens(lambda: Masked("causal")),
        "mask from the input": tokens(ContentMasked),
        "across samples": tokens(AcrossSamples),
        "softmax over queries": tokens(SoftmaxOverQueries),
        "channel attention": tokens(ChannelAttention),
        "best keys only": tokens(Selected),
        "pooled keys": tokens(Pooled),
        "no prefix": tokens(Packed, prefix=0),
        "suffix tokens": tokens(Packed, prefix=0, suffix=3),
        "prefix and suffix": tokens(Packed, prefix=2, suffix=1),
        "tied blocks": tied,
        "block called twice": lambda: Classifier(Reused(Block(Packed()))),
        "tied attention in two blocks": lambda: Classifier(*(Block(mixer) for mixer in [Packed()] * 2)),
        "map attention": maps(MapAttention, MapAttention),
        "windows": maps(Windows, lambda: Windows(shift=2)),
        "windows, convolutions": maps(lambda: Windows(linear=False)),
        "unfold windows": maps(lambda: Unfolded(4)),
        "unfold with halo": maps(lambda: Unfolded(4, 1)),
        "axial": maps(Axial),
    }
    return [Case(f"handwritten:{name}", build, (3, 8 * SIDE, 8 * SIDE)) for name, build in builders.items()]


def cases() -> list[Case]:
    return handwritten_cases() + torchvision_cases() + transformers_cases() + timm_cases()


def table(rows: list[Row], batch: int) -> str:
    """The result as Markdown."""
    defects = sum(row.is_defect for row in rows)
    converted = sum(bool(row.sites) for row in rows)
    head = [
        f"# Identity conversion of {len(rows)} small models",
        "",
        f"Captured at a batch of {batch}, compared at {batch} and at {OTHER_BATCH} in eval mode. An error is relative",
        f"to the greatest output and may be {TOLERANCE:.0e}. torch {torch.__version__}.",
        f"{converted} converted, {len(rows) - converted} not; {defects} defects. Made by `benchmarks/zoo_sweep.py`.",
        "",
        "| model | sites | worst error | seconds | verdict |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(str, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="*", help="names of the models to run, as a glob")
    parser.add_argument("--batch", type=int, default=1, help="samples of the example input")
    arguments = parser.parse_args()
    ensure_torchvision()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for case in cases():
        if not fnmatchcase(case.name, arguments.only):
            continue
        rows.append(sweep(case, arguments.batch))
        print(rows[-1], flush=True)
        if arguments.output is not None:
            arguments.output.write_text(table(rows, arguments.batch), encoding="utf-8")
    print(f"\n{len(rows)} models, {sum(row.is_defect for row in rows)} defects")


if __name__ == "__main__":
    main()
