"""Models of other libraries are recovered too, whether their projections are modules that are called or functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
import transformers
from small_pair import images
from torch import nn

import attnrewrite


def torchvision_vit():
    """Torch's own attention module, whose projections are called as functions."""
    return torchvision.models.VisionTransformer(40, 8, 2, 2, 32, 64, num_classes=5)


def torchvision_swin():
    return torchvision.models.SwinTransformer([4, 4], 32, [2], [2], [5, 5], num_classes=5, stochastic_depth_prob=0.0)


def transformers_vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=8, intermediate_size=64,
        num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def transformers_swin():
    config = transformers.SwinConfig(
        image_size=40, embed_dim=32, depths=[2], num_heads=[2], window_size=5, num_labels=5, drop_path_rate=0.0
    )
    return transformers.SwinForImageClassification(config)


BUILDERS = [torchvision_vit, torchvision_swin, transformers_vit, transformers_swin]


def with_sharp_attention(build):
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
    return model


def pictures(count):
    return images(count).expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_recovered(build):
    original = with_sharp_attention(build)
    converted = attnrewrite.convert(original, "neighborhood", pictures(1), kernel_size=3, progress=False)
    calibrated = attnrewrite.calibrate(converted, original, pictures(128), n=96, progress=False)
    done = attnrewrite.report(calibrated).calibration
    attention = [row.name for row in attnrewrite.report(converted).sites if row.status == "converted"]
    assert len(attention) == 2
    assert not [what for what in done.sites.values() if what.startswith("skipped")], "no projection is out of reach"
    assert any("projection" in done.sites[name] and "taken back" not in done.sites[name] for name in attention)
    with torch.no_grad():
        before, after, expected = (logits(model(pictures(160)[128:])) for model in (converted, calibrated, original))
    assert (after - expected).norm() < 0.8 * (before - expected).norm()


def test_a_projection_read_in_the_wrong_order_is_refused():
    """The input of a projection that is called as a function is the core's; its heads must lie as the weight reads."""
    original = with_sharp_attention(torchvision_vit)
    converted = attnrewrite.convert(original, "neighborhood", pictures(1), kernel_size=3, progress=False)
    place, *others = converted.attnrewrite_places
    assert place.projection.columns
    swapped = replace(place.projection, columns=place.projection.columns[16:] + place.projection.columns[:16])
    converted.attnrewrite_places = [replace(place, projection=swapped), *others]
    done = attnrewrite.report(attnrewrite.calibrate(converted, original, pictures(12), n=12, progress=False))
    assert done.calibration.sites[place.name].startswith("skipped: the residual stream after it is not")


def logits(output):
    return getattr(output, "logits", output)
