"""RMT: sizes, both code generations, any image, every precision, official weights."""

from __future__ import annotations

import pytest
import torch
from model_checks import check_any_size, check_half_precision, check_head_in_parts
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import RMT, create_model, list_models, load_official
from attnrewrite.modules.rmt_block import StagePosition

NAMES = ("rmt_tiny", "rmt_small", "rmt_base", "rmt_large")
SMALL = {
    "num_classes": 7,
    "embed_dims": (16, 24, 32, 48),
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "mlp_ratios": (2, 2, 1.5, 1),
    "layer_scales": (False, False, True, True),
    "projection": 40,
}
GENERATIONS = pytest.mark.parametrize("generation", ["2024", "2023"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def small(seed=0, **options):
    """With weights that are all of some size: official ones start with factors of 1e-6 and zero biases."""
    torch.manual_seed(seed)
    model = RMT(**{**SMALL, **options})
    for part in model.parameters():
        part.data.add_(0.1 * torch.randn_like(part))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def parameters(model):
    return sum(part.numel() for part in model.parameters())


@pytest.mark.parametrize(
    ("generation", "counts"),
    [
        ("2024", (14_334_216, 26_967_240, 54_154_896, 95_464_864)),
        ("2023", (13.19e6, 25.70e6, 52.69e6, 93.84e6)),  # published to two decimals
    ],
)
def test_sizes_of_the_released_models(generation, counts):
    for name, count in zip(NAMES, counts, strict=True):
        with torch.device("meta"):
            found = parameters(create_model(name, generation=generation))
        assert found == count if generation == "2024" else abs(found - count) <= 5e3


@pytest.mark.parametrize(
    ("name", "token_label", "count"),
    [("rmt_small", "projected", 27_992_240), ("rmt_base", "map", 54_667_896), ("rmt_large", "map", 96_105_864)],
)
def test_sizes_with_token_labels(name, token_label, count):
    with torch.device("meta"):
        assert parameters(create_model(name, token_label=token_label)) == count


@pytest.mark.parametrize(
    ("name", "macs"), [("rmt_tiny", 2.637), ("rmt_small", 4.777), ("rmt_base", 10.373), ("rmt_large", 19.488)]
)
def test_contractions_of_the_released_models(name, macs):
    with torch.device("meta"):
        model, image = create_model(name), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert round(counter.get_total_flops() / 2e9, 3) == macs


def test_names():
    assert list_models("rmt_*") == sorted(NAMES)


def test_the_tiny_model_at_224():
    model = create_model("rmt_tiny", num_classes=10)
    logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in model.parameters())


@GENERATIONS
@pytest.mark.parametrize("size", [(96, 160), (75, 53), (33, 32)])
def test_any_image_size_forward_and_backward(generation, size):
    check_any_size(small(generation=generation), torch.randn(2, 3, *size), classes=7)


def test_the_size_of_one_image_leaves_no_trace_in_the_next():
    model = small()
    images = [torch.randn(1, 3, *size) for size in [(64, 64), (96, 40)]]
    first = model(images[0])
    model(images[1])
    assert torch.equal(model(images[0]), first)


def test_the_generations_compute_something_else_from_the_same_blocks():
    old, new = small(generation="2023"), small(generation="2023", rotary="raster")
    new.load_state_dict(old.state_dict())
    image = torch.randn(1, 3, 64, 96)
    assert (old(image) - new(image)).abs().max() > 1e-3


@pytest.mark.parametrize("option", [{"lce": False}, {"decay_placement": "outside"}, {"ffn_conv": False}])
def test_what_can_be_switched_changes_the_result(option):
    full, other = small(), small(**option)
    state = full.state_dict()
    other.load_state_dict({name: state[name] for name in other.state_dict()})
    image = torch.randn(1, 3, 64, 64)
    assert (full(image) - other(image)).abs().max() > 1e-3


def test_layer_scales_are_where_they_are_asked_for():
    names = [name for name in small().state_dict() if "gamma" in name]
    assert names == [f"layers.{stage}.blocks.0.gamma_{place}" for stage in (2, 3) for place in (1, 2)]


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
def test_feature_maps(dense):
    model = small(dense=dense, num_classes=0)
    maps = model.feature_maps(torch.randn(2, 3, 96, 75))
    assert [tuple(part.shape) for part in maps] == [(2, 16, 24, 19), (2, 24, 12, 10), (2, 32, 6, 5), (2, 48, 3, 3)]
    assert [info["num_chs"] for info in model.feature_info] == [16, 24, 32, 48]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert all(info["module"] in dict(model.named_modules()) for info in model.feature_info)


def test_features_only_gives_the_chosen_levels():
    model = create_model("rmt_tiny", features_only=True, out_indices=(1, -1), **SMALL | {"num_classes": 0})
    assert [part.shape[1] for part in model(torch.randn(1, 3, 64, 64))] == [24, 48]


@GENERATIONS
def test_the_head_in_parts(generation):
    model = small(generation=generation)
    features, pooled = check_head_in_parts(model, torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 2, 2, model.num_features)
    assert pooled.shape == (2, model.head_hidden_size) == (2, 40 if generation == "2024" else 48)


@pytest.mark.parametrize("kind", ["map", "projected"])
def test_token_labels_add_half_of_the_strongest_token(kind):
    model, image = small(token_label=kind), torch.randn(2, 3, 96, 64)
    plain = small()
    plain.load_state_dict({name: part for name, part in model.state_dict().items() if "aux_head" not in name})
    features = model.forward_features(image)
    if kind == "projected":
        projected = plain.norm(plain.proj(features).permute(0, 3, 1, 2))
        features = torch.nn.functional.silu(projected).permute(0, 2, 3, 1)
    tokens = features.flatten(1, 2) @ model.aux_head.weight.T + model.aux_head.bias
    expected = plain(image) + 0.5 * tokens.max(dim=1).values
    torch.testing.assert_close(model(image), expected)
    model.reset_classifier(4)
    assert model(image).shape == (2, 4)
    model.reset_classifier(0)
    assert model.aux_head is None


def test_export_with_any_batch_and_size():
    model = small(depths=(1, 1, 1, 1))
    sizes = ({0: Dim("batch", max=64), 2: Dim.AUTO, 3: Dim.AUTO},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=sizes).module()
    for size in [(64, 96), (96, 75)]:
        image = torch.randn(5, 3, *size)
        torch.testing.assert_close(exported(image), model(image))


@HALF
def test_half_precision_forward_and_backward(dtype):
    check_half_precision(small(), torch.randn(2, 3, 96, 64), dtype)


def test_autocast_forward_and_backward():
    model, image = small(), torch.randn(2, 3, 96, 64)
    expected = model(image).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image)
    found.float().square().sum().backward()
    assert (found - expected).norm() / expected.norm() < 0.05
    assert all(part.grad.isfinite().all() for part in model.parameters())


def test_the_decays_survive_a_half_precision_file():
    model = small()
    rounded = {name: part.bfloat16() if part.is_floating_point() else part for name, part in model.state_dict().items()}
    other = small(seed=1)
    other.load_state_dict(rounded)
    position = other.layers[0].Relpos
    assert (position.decay - model.layers[0].Relpos.decay).abs().max() > 1e-5  # the buffer is rounded,
    for mine, exact in zip(position(9, 9, position.decay), model.layers[0].Relpos(9, 9, position.decay), strict=True):
        assert torch.equal(mine, exact)  # the tables are not


@pytest.mark.parametrize("wrap", ["model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
@GENERATIONS
def test_official_weights_tell_their_generation(wrap, prefix, generation):
    model = small(generation=generation)
    checkpoint = {wrap: {prefix + name: part for name, part in model.state_dict().items()}, "epoch": 3}
    loaded = load_official(checkpoint, "rmt_tiny", **SMALL).eval()
    image = torch.randn(1, 3, 64, 96)
    assert torch.equal(loaded(image), model(image))
    assert (loaded.proj is None) == (generation == "2023")


def test_official_weights_tell_token_labels():
    for kind in ("map", "projected"):
        loaded = load_official(small(token_label=kind).state_dict(), "rmt_tiny", **SMALL)
        assert loaded.token_label == kind


def test_official_weights_tell_a_dense_backbone():
    model = small(dense=True, num_classes=0)
    loaded = load_official({"state_dict": model.state_dict()}, "rmt_tiny", **SMALL | {"num_classes": 0}).eval()
    image = torch.randn(1, 3, 64, 64)
    for mine, other in zip(loaded.feature_maps(image), model.feature_maps(image), strict=True):
        assert torch.equal(mine, other)


@GENERATIONS
def test_the_variant_is_found_by_its_shapes(generation):
    state = create_model("rmt_tiny", generation=generation, num_classes=11).state_dict()
    loaded = load_official(state)
    assert isinstance(loaded, RMT)
    assert loaded.num_classes == 11
    assert torch.equal(loaded.head.weight, state["head.weight"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_classes": 5}, r"head.weight: expected \(5, 40\), found \(7, 40\)"),
        ({"generation": "2023"}, "not in the model"),
        ({"embed_dims": (16, 24, 32, 64)}, "layers.2.downsample.reduction.weight"),
        ({"depths": (1, 1, 1, 1)}, "layers.1.blocks.1"),
    ],
)
def test_weights_of_another_model_are_refused(options, reason):
    with pytest.raises(CheckpointError, match=reason):
        load_official(small().state_dict(), "rmt_tiny", **SMALL | options)


def test_mixed_generations_are_refused():
    state = {name: part for name, part in small().state_dict().items() if not name.startswith("proj.")}
    with pytest.raises(CheckpointError, match="mixes code generations"):
        load_official(state, "rmt_tiny", **SMALL)


def test_weights_trained_with_other_decays_are_refused_before_anything_is_loaded():
    model = small(seed=1)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"layers.2.Relpos.decay: .* decay_ranges"):
        load_official(small(decay_ranges=(4, 4, 5, 6)).state_dict(), model)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_decays_that_are_only_rounded_are_accepted():
    position = StagePosition(16, 8, 2, 6, "raster")
    assert position.agrees(position.decay.bfloat16())
    assert not position.agrees(position.decay * 1.05)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"generation": "2025"}, "generation: must be one of 2024, 2023"),
        ({"token_label": "maps"}, "token_label: must be None or one of map, projected"),
        ({"token_label": "projected", "generation": "2023"}, "token_label: generation 2023 has no projected map"),
        ({"dense": True}, "num_classes: a dense backbone has no classifier"),
        ({"depths": (1, 1, 1)}, "depths: all per-stage options must have the same length"),
        ({"num_heads": (2, 2, 5, 4)}, "num_heads: must divide dim=32"),
        ({"rotary": "raste"}, "rotary: .* did you mean 'raster'"),
        ({"decay_placement": "before"}, "decay_placement: must be one of inside, outside"),
    ],
)
def test_options_without_meaning(options, reason):
    with pytest.raises(ArgumentError, match=reason):
        RMT(**{**SMALL, **options})
