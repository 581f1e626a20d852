"""A converted model at other image sizes gives the original's result or refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from model_queries import run
from neighborhood_oracle import masked_logits
from pairs import SWINS
from repetition import thinned
from small_models import difference, images, small_model, timm_pvt
from torch.utils._pytree import tree_leaves

import attnrewrite
from attnrewrite.errors import ConversionError


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        pytest.param("timm_vit", (64, 96), {"img_size": (64, 96)}, marks=pytest.mark.slow),
        ("timm_swin", (56, 112), {"img_size": (56, 112)}),
        ("torchvision_swin", (112, 56), {}),
        pytest.param("transformers_vit", (96, 64), {"image_size": (96, 64)}, marks=pytest.mark.slow),
        pytest.param("transformers_swin", (56, 112), {"image_size": (56, 112)}, marks=pytest.mark.slow),
    ],
)
def test_images_that_are_not_square(name, size, options):
    donor, to = small_model(name, **options), "neighborhood" if name == "timm_swin" else "identity"
    batch = images(name, 2, size=size)
    converted = attnrewrite.convert(donor, to, batch[:1])
    assert "attention" in {site.kind for site in attnrewrite.report(converted).converted}
    assert difference(run(converted, batch), run(donor, batch)) < 1e-12


OTHER_SIZES = [(112, 112), (84, 84), (56, 84), (100, 60), (28, 28), (40, 72)]
QUICK = [
    ("timm_swin", (84, 84)), ("timm_swin", (28, 28)), ("torchvision_swin", (112, 112)), ("torchvision_swin", (40, 72)),
    ("transformers_swin", (56, 84)), ("transformers_swin", (100, 60)),
]  # fmt: skip
"""Every size once."""
OTHER_BRANCHES = {
    ("timm_swin", (28, 28)): "whether a single window is shifted differs from model to model",
    ("torchvision_swin", (28, 28)): "the original would take another branch",
    ("transformers_swin", (112, 112)): "the original would take another branch",
    ("transformers_swin", (56, 84)): "the original would take another branch",
    ("transformers_swin", (100, 60)): "the original would take another branch",
}
"""Refused, for no look at the model took the way that it takes there."""


@pytest.fixture(scope="module")
def flexible():
    made = {}

    def pair(name, to):
        if (name, to) not in made:
            donor = small_model(name, **({"strict_img_size": False} if name == "timm_swin" else {}))
            made[name, to] = donor, attnrewrite.convert(donor, to, images(name, 1))
        return made[name, to]

    return pair


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if (name, size) in QUICK else pytest.mark.slow)
        for name in SWINS
        for size in OTHER_SIZES
        if name != "transformers_swin" or min(size) > 40
    ],
    ids=str,
)  # the one of transformers takes no map below its window
def test_windows_at_another_size_are_right_or_refused(flexible, name, size):
    donor, converted = (copy.deepcopy(model) for model in flexible(name, "identity"))  # some remember their sizes
    expected = run(donor, images(name, size=size))
    if (name, size) in OTHER_BRANCHES:
        with pytest.raises(ConversionError, match=OTHER_BRANCHES[name, size]):
            run(converted, images(name, size=size))
    else:
        assert difference(run(converted, images(name, size=size)), expected) < 1e-9


@pytest.mark.parametrize("name", [pytest.param("timm_swin", marks=pytest.mark.slow), "torchvision_swin"])
def test_windows_follow_the_image_when_it_grows(name):
    """Where all windows, shifts and borders were seen, refusing a larger map would be too careful."""
    donor = small_model(name, **({"img_size": 112, "strict_img_size": False} if name == "timm_swin" else {}))
    converted = attnrewrite.convert(donor, "neighborhood", images(name, 1, size=(112, 112)))
    batch = images(name, size=(112, 224))
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    donor = timm_pvt().double().eval()
    return donor, attnrewrite.convert(donor, "identity", torch.randn(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 96), (128, 64)], ids=str)
def test_a_pyramid_at_another_size_is_its_donor(pyramid, size):
    donor, converted = pyramid
    batch = torch.randn(2, 3, *size, dtype=torch.float64)
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


def test_a_pyramid_follows_the_image_when_it_grows(pyramid):
    donor, converted = pyramid
    batch = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 80)], ids=str)
def test_a_timm_vit_of_dynamic_size_is_its_donor(size):
    donor = small_model("timm_vit", dynamic_img_size=True)
    converted = attnrewrite.convert(donor, "identity", images("timm_vit", 1))
    batch = images("timm_vit", size=size)
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


@pytest.mark.parametrize("size", [(96, 96), (64, 128)], ids=str)
def test_an_argument_that_admits_other_sizes_is_no_conversion_for_them(pairs, size):
    """Without ``interpolate_pos_encoding`` no other size could be looked at."""
    pair = pairs("transformers_vit")
    batch = images("transformers_vit", size=size)
    assert run(pair.donor, batch, interpolate_pos_encoding=True).isfinite().all()
    with pytest.raises(ConversionError, match=r"only be converted for \[any, 3, 64, 64\]; convert"):
        run(pair.converted, batch, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("kernel_size", "size"),
    thinned([(1, (96, 96)), (1, (64, 128)), (1, (48, 80)), (1, (64, 16)), (2, (128, 32)), (2, (32, 128))], 2),
    ids=str,
)
def test_a_kernel_at_another_size_acts_on_that_map(kernel_size, size):
    """A sequence does not tell the map's sides: 2x8 and 4x4 patches are sixteen tokens both, but not the same map."""
    donor = small_model("timm_vit", dynamic_img_size=True)
    converted = attnrewrite.convert(donor, "neighborhood", images("timm_vit", 1), kernel_size=kernel_size)
    batch = images("timm_vit", size=size)
    with torch.no_grad():
        expected = masked_logits(donor, batch, kernel_size)
    assert difference(run(converted, batch), expected) < 1e-9


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates", "get_intermediate_layers"])
def test_another_map_with_as_many_tokens_is_known_to_every_method(method):
    """2x8 patches, where the model was converted at 4x4: the same as by a model that was converted for them."""
    batch, small = images("timm_vit", size=(128, 32)), {"dynamic_img_size": True}
    converted = attnrewrite.convert(
        small_model("timm_vit", **small), "neighborhood", images("timm_vit", 1), kernel_size=2
    )
    for_it = attnrewrite.convert(
        small_model("timm_vit", **small), "neighborhood", images("timm_vit", 1, size=(128, 32)), kernel_size=2
    )
    with torch.no_grad():
        expected = tree_leaves(getattr(for_it, method)(batch))
        for model in (converted, copy.deepcopy(converted)):
            actual = tree_leaves(getattr(model, method)(batch))
            assert max(difference(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-9
    donor, reverted = small_model("timm_vit", **small), attnrewrite.revert(converted)
    assert torch.equal(reverted.forward_features(batch), donor.forward_features(batch))


def test_a_map_known_by_its_reduced_keys_may_take_another_shape(pyramid):
    donor, _ = pyramid
    reduced = ["stages.0*", "stages.1*", "stages.2*"]
    converted = attnrewrite.convert(donor, "aggregated", torch.randn(1, 3, 64, 64, dtype=torch.float64), sites=reduced)
    batch = torch.randn(2, 3, 128, 64, dtype=torch.float64)
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9
