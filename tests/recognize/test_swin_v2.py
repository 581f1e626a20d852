"""Swin V2 of three libraries: cosine attention inside windows, whose scale and position bias go on learning."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import torchvision
import transformers
from model_queries import run
from repetition import thinned
from small_models import assert_same_gradients, difference, gradients
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attnrewrite

ONE_STAGE = {"embed_dim": 16, "depths": (2,), "num_heads": (2,), "num_classes": 5, "drop_path_rate": 0.0}


def timm_v2(size: tuple[int, int], window: int, name: str = "swinv2_tiny_window8_256") -> nn.Module:
    return timm.create_model(name, img_size=size, window_size=window, **ONE_STAGE)


def timm_cr(size: tuple[int, int], window: int) -> nn.Module:
    return timm_v2(size, window, "swinv2_cr_tiny_224")


def torchvision_v2(size: tuple[int, int], window: int) -> nn.Module:
    library = torchvision.models.swin_transformer
    return library.SwinTransformer(
        [4, 4], 16, [2], [2], [window, window], num_classes=5, stochastic_depth_prob=0.0,
        block=library.SwinTransformerBlockV2, downsample_layer=library.PatchMergingV2,
    )  # fmt: skip


def transformers_v2(size: tuple[int, int], window: int) -> nn.Module:
    config = transformers.Swinv2Config(
        image_size=size, embed_dim=16, depths=[2], num_heads=[2], window_size=window, num_labels=5, drop_path_rate=0.0
    )
    return transformers.Swinv2ForImageClassification(config)


CASES = {
    "timm": (timm_v2, (32, 48), 4),
    "timm, padded": (timm_v2, (36, 28), 4),
    "timm, one window": (timm_v2, (16, 16), 4),
    "timm cr": (timm_cr, (32, 48), 4),
    "torchvision": (torchvision_v2, (32, 48), 4),
    "torchvision, padded": (torchvision_v2, (36, 28), 4),
    "transformers": (transformers_v2, (32, 48), 4),
    "transformers, padded": (transformers_v2, (36, 28), 4),
}


def model_and_images(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """In eval mode, no weight trivial: norms, the biases of keys, the scales of the heads."""
    make, size, window = CASES[name]
    torch.manual_seed(0)
    model = make(size, window).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
        elif parameter.ndim < 4:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model, torch.randn(2, 3, *size, dtype=dtype)


@pytest.mark.parametrize(("to", "name"), thinned(itertools.product(["identity", "neighborhood"], CASES), 3))
def test_every_window_is_kept_exactly(to: str, name: str) -> None:
    donor, images = model_and_images(name)
    converted, made = attnrewrite.convert(donor, to=to, example_inputs=images[:1], return_report=True)
    sites = [site for site in made.sites if site.kind == "attention"]
    assert [site.status for site in sites] == ["converted"] * 2
    assert all("keys window" in site.source and "qk l2 scale learned" in site.source for site in sites)
    assert not [site for site in made.sites if site.status == "refused"]
    assert difference(run(converted, images), run(donor, images)) < 1e-12


@pytest.mark.parametrize("name", thinned(["timm", "timm cr", "torchvision, padded", "transformers, padded"], 4))
def test_float32(name: str) -> None:
    donor, images = model_and_images(name, torch.float32)
    converted = attnrewrite.convert(donor, to="neighborhood", example_inputs=images[:1])
    assert difference(run(converted, images), run(donor, images)) < 2e-5


@pytest.mark.parametrize("name", ["timm, padded", "torchvision", "transformers"])
def test_scale_and_position_bias_learn_as_before(name: str) -> None:
    """After the scales have learned past their clamp as well: it is applied at every call."""
    donor, images = model_and_images(name)
    converted = attnrewrite.convert(copy.deepcopy(donor), to="neighborhood", example_inputs=images[:1])
    for model in (donor, converted):
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("logit_scale"):
                with torch.no_grad():
                    parameter[0] = 7.0
    expected, actual = gradients(donor, images, train=True), gradients(converted, images, train=True)
    assert_same_gradients(actual, expected)
    learned = [n for n in actual if n.endswith("logit_scale") or "cpb_mlp" in n or "position_bias_mlp" in n]
    assert len(learned) == 2 * 4
    for parameter_name in learned:
        gradient = actual[parameter_name]
        assert gradient is not None
        assert bool(gradient.any()), parameter_name
        if parameter_name.endswith("logit_scale"):
            assert float(gradient[0]) == 0.0


def test_another_size_pads() -> None:
    donor, _ = model_and_images("torchvision")
    converted = attnrewrite.convert(donor, to="neighborhood", example_inputs=torch.randn(1, 3, 32, 48).double())
    images = torch.randn(2, 3, 44, 52, dtype=torch.float64)
    assert difference(run(converted, images), run(donor, images)) < 1e-12


TARGETS = [
    ("long_short_distance", {}, "EXACT"),
    ("aggregated", {"windows": "mask"}, "EXACT"),
    ("aggregated", {}, "PROJECTED"),
    ("neighborhood", {"kernel_size": 3}, "PROJECTED"),
    ("long_short_distance", {"shifted": "long"}, "PROJECTED"),
]


@pytest.mark.parametrize(("to", "options", "exactness"), thinned(TARGETS, 3))
def test_other_targets_say_their_class(to: str, options: dict[str, object], exactness: str) -> None:
    donor, images = model_and_images("transformers")
    converted, made = attnrewrite.convert(donor, to=to, example_inputs=images[:1], return_report=True, **options)
    assert exactness in {site.exactness for site in made.converted}
    error = difference(run(converted, images), run(donor, images))
    assert (error < 1e-12) == (exactness == "EXACT")


def test_one_window_is_global_attention_to_manhattan() -> None:
    donor, images = model_and_images("timm, one window")
    converted = attnrewrite.convert(donor, to="manhattan", example_inputs=images[:1])
    assert difference(run(converted, images), run(donor, images)) < 1e-12


@pytest.mark.parametrize("to", ["neighborhood", "aggregated", "long_short_distance", "manhattan"])
def test_published_layers_refuse_what_they_have_no_place_for(to: str) -> None:
    donor, images = model_and_images("timm")
    plan = attnrewrite.plan(donor, to=to, example_inputs=images[:1], official=True)
    whys = [planned.why for planned in plan.sites if planned.site.kind == "attention"]
    assert len(whys) == 2
    assert all("an l2 norm of queries and keys, with a learned scale" in why for why in whys), whys


@pytest.mark.parametrize("name", ["transformers", "transformers, padded"])
def test_a_block_whose_mlp_alone_is_converted_takes_any_batch(name: str) -> None:
    """The windows on its own way go through a child with several results, and back to the images they came from."""
    donor, images = model_and_images(name)
    converted, made = attnrewrite.convert(donor, to="conv_glu", example_inputs=images[:1], return_report=True)
    assert [site.kind for site in made.converted] == ["mlp"] * 2
    assert difference(run(converted, images), run(donor, images)) < 1e-12


def test_costs_are_the_count() -> None:
    donor, images = model_and_images("torchvision")
    converted = attnrewrite.convert(donor, to="neighborhood", example_inputs=images[:1])
    for model in (donor, converted):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images[:1])
        assert attnrewrite.analyze(model, images[:1]).total == counter.get_total_flops() // 2
