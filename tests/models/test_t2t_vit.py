"""T2T-ViT: sizes, any image, positions, precisions, official weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_any_size, check_half_precision
from repetition import thinned
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import T2TViT, create_model, list_models, load_official
from attnrewrite.modules.tokens_to_token import TokensToToken, sinusoid_table

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
BOTH = ["transformer", "performer"]
KINDS = pytest.mark.parametrize("kind", BOTH)
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
    check_any_size(small(kind=kind), torch.randn(2, 3, *size), classes=5)


def test_the_stored_positions_are_those_of_the_index():
    model = small(img_size=(64, 96))
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 24)
    torch.testing.assert_close(model.pos_embed[0], sinusoid_table(25, 24).float(), rtol=0, atol=0)
    assert not model.pos_embed.requires_grad


def codes_at(model, height, width):
    """The codes that the model adds to its tokens for an image of these sides."""
    seen = {}
    hooks = [
        model.tokens_to_token.register_forward_hook(lambda part, inputs, output: seen.update(tokens=output)),
        model.blocks[0].register_forward_pre_hook(lambda part, inputs: seen.update(coded=inputs[0])),
    ]
    with torch.no_grad():
        model(torch.randn(1, 3, height, width))
    for hook in hooks:
        hook.remove()
    tokens = torch.cat([model.cls_token, seen["tokens"].flatten(1, 2)], dim=1)
    return (seen["coded"] - tokens).detach()


def resized(positions, stored, wanted):
    """As the official loader does it, written out for maps of any sides."""
    grid = positions[:, 1:].reshape(1, *stored, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=wanted, mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, wanted[0] * wanted[1], -1)], dim=1)


@pytest.mark.parametrize("stored", [(64, 64), (48, 80)])
@pytest.mark.parametrize("size", [(96, 96), (48, 112), (80, 48), (48, 48), (67, 35)])
def test_another_map_gets_the_stored_positions_resampled(stored, size):
    model = small(img_size=stored)
    model.pos_embed.data.normal_()
    expected = resized(model.pos_embed, TokensToToken.grid(*stored), TokensToToken.grid(*size))
    torch.testing.assert_close(codes_at(model, *size), expected, rtol=0, atol=1e-5)


def test_the_published_224_at_384():
    model = create_model("t2t_vit_7", num_classes=0).eval()
    expected = resized(model.pos_embed, (14, 14), (24, 24))
    similarity = F.cosine_similarity(codes_at(model, 384, 384), expected, dim=-1)
    assert similarity.min() > 1 - 1e-5


def test_an_image_of_as_many_tokens_is_another_map():
    """The raster index of 4 x 6 tokens is not that of 6 x 4."""
    model = small(img_size=(64, 96))
    expected = resized(model.pos_embed, (4, 6), (6, 4))
    torch.testing.assert_close(codes_at(model, 96, 64), expected, rtol=0, atol=1e-5)


def test_resampling_once_or_at_every_image_is_the_same():
    model, other = small(img_size=64), small(img_size=(48, 80))
    other.load_state_dict({**model.state_dict(), "pos_embed": resized(model.pos_embed, (4, 4), (3, 5))})
    image = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(model(image), other(image))


@pytest.mark.parametrize("size", [(64, 64), (80, 80), (64, 96), (35, 77)])
def test_tuned_positions_have_an_effect_at_every_size(size):
    model, image = small(), torch.randn(1, 3, *size)
    before = model(image)
    model.pos_embed.data.neg_()
    assert not torch.allclose(before, model(image), atol=1e-3)


def test_positions_can_be_tuned_at_another_size():
    model = small()
    model.pos_embed.requires_grad_()
    model(torch.randn(2, 3, 80, 96)).square().sum().backward()
    assert (model.pos_embed.grad.abs().sum(-1) > 0).all()


def test_the_stored_map_gets_the_stored_positions_themselves():
    model = small()
    assert model._positions(4, 4) is model.pos_embed


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


EXPORTED = [
    pytest.param(size, kind, id=f"size{place}-{kind}")
    for place, size in enumerate([(64, 64), (64, 96), (80, 112)])
    for kind in BOTH
]


@pytest.mark.parametrize(("size", "kind"), thinned(EXPORTED, 3))
def test_one_exported_graph_takes_every_size(size, kind):
    """The stored one too, whichever it was exported with."""
    model, sides = small(kind=kind), {axis: Dim(name, min=32, max=256) for axis, name in ((2, "height"), (3, "width"))}
    exported = torch.export.export(model, (torch.randn(2, 3, *size),), dynamic_shapes=(sides,)).module()
    for other in ((64, 64), (64, 80), (96, 64), (35, 77)):
        image = torch.randn(2, 3, *other)
        torch.testing.assert_close(exported(image), model(image))


def test_one_compiled_graph_takes_every_size():
    model, graphs = small(), []
    compiled = torch.compile(
        model, dynamic=True, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    with torch.no_grad():
        for size in ((64, 96), (64, 80), (112, 80), (96, 64)):
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(image), model(image))
    assert len(graphs) == 1


@KINDS
@HALF
def test_half_precision_and_autocast(kind, dtype):
    check_half_precision(small(kind=kind), torch.randn(2, 3, 64, 96), dtype)


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


@pytest.mark.parametrize("given", ["name", "model", "shapes"])
def test_positions_of_another_size_are_resampled_as_they_are_loaded(given):
    """What the official loader does for fine-tuning."""
    options = {"num_classes": 3, "img_size": (64, 96)}
    state = create_model("t2t_vit_7", **{**options, "img_size": 64}).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    if given == "model":
        loaded = load_official(state, create_model("t2t_vit_7", **options))
    else:
        loaded = load_official(state, "t2t_vit_7" if given == "name" else None, **options)
    assert loaded.position_grid == (4, 6)
    torch.testing.assert_close(loaded.pos_embed.data, resized(state["pos_embed"], (4, 4), (4, 6)), rtol=0, atol=1e-5)


def test_positions_of_a_map_that_is_not_square():
    state = create_model("t2t_vit_7", img_size=(64, 96)).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    for name in (None, "t2t_vit_7"):
        loaded = load_official(state, name, img_size=(64, 96))
        assert loaded.position_grid == (4, 6)
        assert torch.equal(loaded.pos_embed, state["pos_embed"])
        with pytest.raises(CheckpointError, match=r"24 positions .* 14 x 14 map .*; pass img_size=\(height, width\)"):
            load_official(state, name)
    with pytest.raises(CheckpointError, match=r"24 positions .* 4 x 4 map"):
        load_official(state, create_model("t2t_vit_7", img_size=64))


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
    [({"num_heads": 5}, "num_heads"), ({"kind": "none"}, "kind"), ({"num_classes": -1}, "num_classes"),
     ({"img_size": (64, 2)}, "img_size")],
)
def test_bad_arguments(options, reason):
    with pytest.raises(ArgumentError, match=reason):
        small(**options)
