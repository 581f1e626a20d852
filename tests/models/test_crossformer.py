"""CrossFormer and CrossFormer++ as whole models."""

from __future__ import annotations

import pytest
import torch
from model_checks import check_half_precision
from torch import nn

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import create_model, load_official
from attnrewrite.models.crossformer import CrossFormer, group_schedule

PARAMETERS = {
    "crossformer_tiny": 27_776_794,
    "crossformer_small": 30_657_394,
    "crossformer_base": 51_971_554,
    "crossformer_large": 91_971_184,
    "crossformerpp_small": 23_325_340,
    "crossformerpp_base": 51_994_594,
    "crossformerpp_large": 92_001_904,
    "crossformerpp_huge": 95_962_944,
}


def small(**options):
    torch.manual_seed(0)
    given = {"num_classes": 5, "embed_dim": 32, "depths": (1, 2, 4, 1), "num_heads": (1, 2, 4, 8)}
    return CrossFormer(**{**given, "group_sizes": (4, 4, 4, 2), "intervals": (4, 2, 1, 1), "cooling": True, **options})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(part.numel() for part in model.parameters()) == PARAMETERS[name]


def test_cooling_layers_stand_after_every_third_block_but_the_last():
    with torch.device("meta"):
        model = create_model("crossformerpp_huge")
    cooled = [
        [place for place, block in enumerate(stage.blocks) if block.ex_conv is not None] for stage in model.layers
    ]
    assert cooled == [[2], [2], [2, 5, 8, 11, 14], []]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 117), (101, 67)])
def test_any_size_forward_and_backward(height, width):
    model = small()
    model(torch.randn(2, 3, height, width)).square().sum().backward()
    gradients = {name: part.grad for name, part in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_224():
    model = create_model("crossformerpp_small", num_classes=3)
    logits = model(torch.randn(1, 3, 224, 224))
    logits.sum().backward()
    assert logits.shape == (1, 3)
    assert model.patch_embed.projs[3].weight.grad.abs().sum() > 0


def test_a_batch_is_its_images():
    model = small().double().eval()
    images = torch.randn(3, 3, 76, 64, dtype=torch.float64)
    torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    check_half_precision(small().eval(), torch.randn(1, 3, 72, 80), dtype)


def test_autocast_is_near():
    model, image = small().eval(), torch.randn(1, 3, 72, 80)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image).float()
    torch.testing.assert_close(found, model(image), atol=0.05, rtol=0.05)  # bfloat16 has 8 bits


def test_feature_maps_and_classifier():
    maps = create_model("crossformer_tiny", features_only=True, out_indices=(0, -1))(torch.randn(1, 3, 64, 96))
    assert [tuple(part.shape) for part in maps] == [(1, 64, 16, 24), (1, 512, 2, 3)]
    model = small()
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 256)


def test_a_wrapped_checkpoint_with_old_buffers_finds_its_variant():
    source = create_model("crossformer_tiny", num_classes=4)
    old = {"layers.0.blocks.0.attn.biases": torch.zeros(169, 2)}
    loaded = load_official({"model": {**source.state_dict(), **old}})
    assert isinstance(loaded, CrossFormer)
    assert all(torch.equal(part, source.state_dict()[name]) for name, part in loaded.state_dict().items())


def test_weights_of_another_variant_are_refused():
    state = create_model("crossformer_tiny").state_dict()
    with pytest.raises(CheckpointError, match="crossformerpp_small"):
        load_official(state, "crossformerpp_small")


def test_export_with_any_batch():
    model = small().eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(batch,)).module()
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program(images), model(images), atol=1e-5, rtol=1e-5)


def test_schedules_grow_to_the_whole_map():
    linear = group_schedule("linear", (2, 2, 6, 2), 56)
    assert linear[0][0] == 4
    assert linear[3] == sorted(linear[3])
    assert group_schedule("7_14", (1, 1, 6, 1), 56, (4, 4, 14, 7)) == [[4], [4], [7, 7, 7, 7, 14, 14], [7]]
    assert set(group_schedule("alter", (2, 2, 6, 2), 56)[2]) <= set(range(4, 8)) | {14}
    with pytest.raises(ArgumentError, match="'linear'"):
        group_schedule("linaer", (1,), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "depths"),
        ({"merge_kernels": ((2, 4),)}, "merge_kernels"),
        ({"group_sizes": ((4, 4, 4), 4, 4, 2)}, "group_sizes"),
        ({"num_heads": (3, 2, 4, 8)}, "num_heads"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        small(**options)


def test_a_drop_path_rate_only_acts_in_training():
    model = small(drop_path_rate=0.9)
    image = torch.randn(4, 3, 64, 64)
    assert torch.equal(model.eval()(image), model(image))
    assert isinstance(model.head, nn.Linear)
    assert not torch.equal(model.train()(image), model(image))
