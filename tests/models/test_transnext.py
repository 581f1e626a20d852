"""The whole TransNeXt models: sizes, weights, classifier, precision, export."""

import pytest
import torch
from torch.export import Dim, export

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import TransNeXt, create_model, load_official

SMALL = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 1, 1),
    "pretrain_size": 64,
    "num_classes": 5,
}
PARAMETERS = {
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_are_as_many_as_published(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(part.numel() for part in model.parameters()) == count
    assert not list(model.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transnext_micro", "transnext_micro_aaaa"])
def test_forward_and_backward_at_224(name):
    model = create_model(name, num_classes=10, drop_path_rate=0.2)
    logits = model(torch.randn(2, 3, 224, 224))
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert all(part.grad.isfinite().all() for part in model.parameters())


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (33, 65), (70, 50), (20, 20)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"fixed_pool_size": 2}, {"interpolate_bias": True}, {"sr_ratios": (16, 8, 4, 2), "window_size": 5}],
    ids=["extrapolated", "fixed pool", "resampled", "no full attention"],
)
def test_any_size(options, size):
    model = TransNeXt(**{**SMALL, **options}).eval()
    image = torch.randn(2, 3, *size)
    maps = model.feature_maps(image)
    sides = list(size)
    for stage, part in enumerate(maps):
        sides = [-(-side // (2 if stage else 4)) for side in sides]
        assert part.shape == (2, SMALL["embed_dims"][stage], *sides)
    logits = model(image)
    assert torch.allclose(logits, model.head(maps[-1].mean((2, 3))), atol=1e-6)
    assert torch.allclose(logits[1:], model(image[1:]), atol=1e-5)
    logits.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in model.parameters())


def test_the_bias_is_resampled_on_other_sizes_only():
    resampled, computed = TransNeXt(**SMALL, interpolate_bias=True).eval(), TransNeXt(**SMALL).eval()
    computed.load_state_dict(resampled.state_dict())
    same, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        for block in (resampled.block1, computed.block1):
            block[0].attn.cpb_fc2.weight.mul_(1e3)
        assert torch.allclose(resampled(same), computed(same), atol=1e-6)
        assert not torch.allclose(resampled(other), computed(other), atol=1e-6)


def test_feature_maps_by_name_and_level():
    model = create_model("transnext_micro", features_only=True, out_indices=(1, -1)).eval()
    assert [(info["num_chs"], info["reduction"], info["module"]) for info in model.feature_info] == [
        (96, 8, "norm2"),
        (384, 32, "norm4"),
    ]
    with torch.no_grad():
        assert [tuple(part.shape) for part in model(torch.randn(1, 3, 64, 32))] == [(1, 96, 8, 4), (1, 384, 2, 1)]


def test_the_classifier_can_be_replaced():
    model = TransNeXt(**SMALL)
    model.reset_classifier(7)
    image = torch.randn(1, 3, 64, 64)
    assert model(image).shape == (1, 7)
    model.reset_classifier(0)
    assert model(image).shape == (1, 32)
    model.reset_classifier(0, "")
    assert model(image).shape == (1, 2, 2, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite(dtype):
    model = TransNeXt(**SMALL)
    image = torch.randn(2, 3, 64, 48)
    expected = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(image).float(), expected, atol=0.05)
    half = model.to(dtype)
    logits = half(image.to(dtype))
    assert torch.allclose(logits.float(), expected, atol=0.05)
    logits.float().sum().backward()
    assert all(part.grad.isfinite().all() for part in half.parameters())


@pytest.mark.slow  # tracing four stages takes most of the time of this file
def test_export_with_any_number_of_images():
    model = TransNeXt(**SMALL).eval()
    exported = export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: Dim("B", max=64)},)).module()
    image = torch.randn(5, 3, 64, 64)
    assert torch.allclose(exported(image), model(image), atol=1e-5)


def test_official_weights_are_recognized_in_their_wrappers(tmp_path):
    model = create_model("transnext_micro", num_classes=3)
    state = model.state_dict()
    torch.save({"model": {f"module.{name}": part for name, part in state.items()}, "epoch": 3}, tmp_path / "best.pth")
    loaded = load_official(tmp_path / "best.pth")
    assert isinstance(loaded, TransNeXt)
    assert loaded.num_classes == 3
    assert all(torch.equal(part, state[name]) for name, part in loaded.state_dict().items())


def test_weights_of_a_segmenter_are_those_of_its_backbone():
    state = create_model("transnext_micro", num_classes=0).state_dict()
    segmenter = {f"backbone.{name}": part for name, part in state.items()}
    segmenter["decode_head.conv_seg.weight"] = torch.zeros(1)
    loaded = load_official({"state_dict": segmenter})
    assert loaded.num_classes == 0
    assert all(torch.equal(part, state[name]) for name, part in loaded.state_dict().items())


def test_weights_of_another_size_are_refused():
    state = TransNeXt(**SMALL).state_dict()
    with pytest.raises(CheckpointError, match="fits no variant of TransNeXt"):
        load_official(state)
    other = TransNeXt(**{**SMALL, "embed_dims": (8, 16, 24, 64)})
    before = other.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"expected \(64"):
        load_official(state, other)
    assert torch.equal(other.head.weight, before)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"depths": (1, 1, 1)}, "depths"),
        ({"window_size": (3, 3)}, "window_size"),
        ({"window_size": (3, None, 3, None)}, "window_size"),
        ({"num_heads": (3, 2, 3, 4)}, "num_heads"),
        ({"global_pool": "max"}, "global_pool"),
    ],
)
def test_arguments_without_meaning(options, argument):
    with pytest.raises(ArgumentError, match=f"^{argument}:"):
        TransNeXt(**{**SMALL, **options})
