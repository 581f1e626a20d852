"""T2T-ViT: sizes, any image, positions, precisions, official weights."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import T2TViT, create_model, list_models, load_official
from attnrewrite.modules.tokens_to_token import sinusoid_table

SIZES = {
    "t2t_vit_7": (4_310_222, 4_255_694, 1.147),
    "t2t_vit_10": (5_889_230, 5_834_702, 1.516),
    "t2t_vit_12": (6_941_902, 6_887_374, 1.763),
    "t2t_vit_14": (21_545_550, 21_465_806, 4.783),
    "t2t_vit_19": (39_177_422, 39_085_070, 8.480),
    "t2t_vit_24": (64_105_934, 64_000_974, 13.662),
    "t2t_vit_t_14": (21_541_070, 21_465_422, 6.089),
    "t2t_vit_t_19": (39_172_942, 39_084_686, 9.785),
    "t2t_vit_t_24": (64_101_454, 64_000_590, 14.967),
    "t2t_vit_14_resnext": (21_545_550, 21_465_806, 4.783),
    "t2t_vit_14_wide": (25_156_302, 25_000_910, 5.229),
}
SMALL = {
    "num_classes": 5,
    "img_size": 64,
    "token_dims": (8, 8),
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
KINDS = pytest.mark.parametrize("kind", ["transformer", "performer"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def small(**options):
    model = T2TViT(**{**SMALL, **options})
    for name, part in model.named_parameters():
        if part.requires_grad and not name.endswith(".w"):
            part.data.add_(0.1 * torch.randn_like(part))
    return model.eval()


def trained(model):
    return [part for part in model.parameters() if part.requires_grad]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_published_models(name):
    with torch.device("meta"):
        model = create_model(name)
    counts = (sum(part.numel() for part in model.parameters()), sum(part.numel() for part in trained(model)))
    assert counts == SIZES[name][:2]


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_14_wide", "t2t_vit_t_14"])
def test_contractions_of_the_published_models(name):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(SIZES[name][2], abs=2e-3)


def test_names():
    assert list_models("t2t_vit_*") == sorted(SIZES)


@pytest.mark.slow
def test_the_smallest_model_at_224():
    model = create_model("t2t_vit_7", num_classes=10)
    logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(part.grad.isfinite().all() for part in trained(model))


@KINDS
@pytest.mark.parametrize("size", [(64, 64), (48, 112), (35, 77), (67, 68)])
def test_any_image_size_forward_and_backward(kind, size):
    model, image = small(kind=kind), torch.randn(2, 3, *size, requires_grad=True)
    logits = model(image)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


def test_the_stored_positions_are_those_of_the_index():
    model = small(img_size=(64, 96))
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 24)
    torch.testing.assert_close(model.pos_embed[0], sinusoid_table(25, 24).float(), rtol=0, atol=0)
    assert not model.pos_embed.requires_grad


def test_another_size_gets_the_positions_of_its_length():
    model = small(img_size=64)
    other = small(img_size=(48, 80))
    other.load_state_dict({**model.state_dict(), "pos_embed": other.pos_embed})
    image = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(model(image), other(image))


def test_stored_positions_are_used_at_their_size_alone():
    """Weights that were fine-tuned hold resized ones."""
    model, images = small(), [torch.randn(1, 3, side, side) for side in (64, 80)]
    before = [model(image) for image in images]
    model.pos_embed.data.neg_()
    after = [model(image) for image in images]
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_default_scale_is_of_the_head():
    """Not of the whole width, with which the official code builds models by name if asked for weights."""
    plain, image = small(), torch.randn(1, 3, 64, 64)
    for scale, equal in ((8**-0.5, True), (24**-0.5, False)):
        other = small(qk_scale=scale)
        other.load_state_dict(plain.state_dict())
        assert torch.allclose(plain(image), other(image), atol=1e-5) == equal


def test_the_head_in_parts_and_the_feature_map():
    model, image = small(), torch.randn(2, 3, 64, 96)
    features = model.forward_features(image)
    assert features.shape == (2, 25, 24)
    assert torch.equal(model.head(features[:, 0]), model(image))
    (level,) = model.feature_maps(image)
    assert torch.equal(level.permute(0, 2, 3, 1).flatten(1, 2), features[:, 1:])
    assert (level.shape, model.feature_info[0]["reduction"]) == ((2, 24, 4, 6), 16)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), features)
    assert create_model("t2t_vit_7", features_only=True, **SMALL)(image)[0].shape == (2, 24, 4, 6)


@KINDS
def test_export_with_any_batch(kind):
    model = small(kind=kind)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: Dim("batch")},)).module()
    image = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported(image), model(image))


@KINDS
@HALF
def test_half_precision_and_autocast(kind, dtype):
    model, image = small(kind=kind), torch.randn(2, 3, 64, 96)
    expected = model(image).detach()
    with torch.autocast("cpu", dtype):
        mixed = model(image)
    found = model.to(dtype)(image.to(dtype))
    for result in (mixed, found):
        assert (result - expected).norm() / expected.norm() < 0.05
    found.float().square().sum().backward()
    assert all(part.grad.isfinite().all() for part in trained(model))


@pytest.mark.parametrize(("wrap", "prefix"), [("state_dict_ema", ""), ("state_dict", "module.")])
def test_official_weights(wrap, prefix):
    model = create_model("t2t_vit_7", num_classes=11).eval()
    loaded = load_official({wrap: {prefix + name: part for name, part in model.state_dict().items()}}).eval()
    assert isinstance(loaded, T2TViT)
    assert loaded.num_classes == 11
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


def test_positions_tell_the_image_size():
    state = small(img_size=96).state_dict()
    loaded = load_official(state, "t2t_vit_7", **{**SMALL, "img_size": 96})
    assert loaded.pos_embed.shape[1] == 37
    del (options := dict(SMALL))["img_size"]
    assert load_official(state, "t2t_vit_7", **options).pos_embed.shape[1] == 37


def test_weights_of_another_model_are_refused():
    state = small().state_dict()
    with pytest.raises(CheckpointError, match=r"blocks\.2\.norm1\.weight is missing"):
        load_official(state, small(depth=3))
    with torch.device("meta"):
        fourteen = create_model("t2t_vit_14").state_dict()
    with pytest.raises(CheckpointError, match=r"fits several models.*: t2t_vit_14, t2t_vit_14_resnext$"):
        load_official(fourteen)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"num_heads": 5}, "num_heads"), ({"kind": "none"}, "kind"), ({"num_classes": -1}, "num_classes")],
)
def test_bad_arguments(options, reason):
    with pytest.raises(ArgumentError, match=reason):
        small(**options)
