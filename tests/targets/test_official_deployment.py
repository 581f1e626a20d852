"""``official=True``: gradients, copies, files, other sizes, and the way back."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from attnrewrite.patterns.targets.conv_glu import ConvGlu
from attnrewrite.patterns.targets.cross_scale import CrossScale
from site_donors import new_cores
from target_donors import distance, donor, images, logits
from test_official_layers import published
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.rewrite.rewritten import RemovedModule

CASES = [
    ("vit, torchvision", "aggregated", {"pool": 2}),
    ("swin", "neighborhood", {"kernel_size": 3}),
    ("vit, average", "conv_glu", {}),
    ("vit", "tokens_to_token", {"kind": "performer"}),
]
SLOW_CASES = [
    ("vit, average, wide", "neighborhood", {"kernel_size": 3}),
    ("vit, average, wide", "manhattan", {}),
    ("vit, average, any size", "long_short_distance", {"group_size": 3}),
    ("pvt v2", "aggregated", {}),
    ("swin", "cross_scale", {}),
    ("swin, transformers", "aggregated", {"pool": 2}),
    ("pvt v1, transformers", "manhattan", {}),
]
EACH = pytest.mark.parametrize(
    ("name", "target", "options"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES],
    ids=[f"{case[0]} {case[1]}" for case in CASES + SLOW_CASES],
)
DEAD = ("relative_pos_bias_local", "learnable_", "cpb_", "sr.", "norm.", "q.bias")


@EACH
def test_gradients_reach_every_weight_and_none_is_left_behind(name, target, options):
    """But for what only the patch tokens of a last block before a class token would use."""
    model = copy.deepcopy(published(name, target, **options)).train()
    output = model(images(name))
    (getattr(output, "logits", output) * torch.arange(1, 6)).square().sum().backward()
    trained = {full: parameter.grad for full, parameter in model.named_parameters() if parameter.requires_grad}
    assert [full for full, grad in trained.items() if grad is None] == []
    dead = [full for full, grad in trained.items() if not float(grad.abs().max()) > 0]
    if name == "vit, torchvision":
        assert all("encoder_layer_1.self_attention" in full for full in dead)
        dead = [full for full in dead if not full.rpartition("attention.")[2].startswith((*DEAD, "query_emb", "temp"))]
    assert dead == []


@EACH
def test_copies_files_and_the_way_back(name, target, options):
    model, batch = published(name, target, **options), images(name)
    expected, changed = logits(model, batch), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(model, batch), expected)
    changed.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(changed, batch), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), batch), expected)
    back, own = attnrewrite.revert(copy.deepcopy(model)), donor(name)
    assert list(back.state_dict()) == list(own.state_dict())
    assert torch.equal(logits(back, batch), logits(own, batch))


@EACH
def test_samples_do_not_meet(name, target, options):
    model, batch = published(name, target, **options), images(name, batch=3)
    assert distance(logits(model, batch)[1:], logits(model, batch[1:])) < 1e-12


def maps_of(model, image):
    """Height and width of the maps that the new layers are given."""
    sides = set()
    handles = [
        core.register_forward_pre_hook(lambda core, given: sides.add(tuple(given[0].shape[1:3])))
        for core in new_cores(model, "attention")
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return sides


@pytest.mark.parametrize("size", [(96, 80), (192, 160), (96, 96), (64, 160)])
def test_other_sizes_of_a_vit(size):
    """The converted size, one of its aspect ratio, and others: the image tells the map."""
    for target, options in (("neighborhood", {"kernel_size": 3}), ("manhattan", {}), ("aggregated", {"pool": 2})):
        model = published("vit, average, any size", target, **options)
        assert maps_of(model, torch.randn(1, 3, *size, dtype=torch.float64)) == {(size[0] // 16, size[1] // 16)}
        turned = torch.randn(1, 3, *size[::-1], dtype=torch.float64)
        assert size[0] == size[1] or distance(logits(model, turned), logits(model, turned.transpose(2, 3))) > 1e-6


def test_another_size_is_attended_to_at_that_size():
    model, donor_ = published("vit, average, any size", "manhattan"), donor("vit, average, any size")
    core, tokens = new_cores(model, "attention")[0], torch.randn(1, 12 * 10, 48, dtype=torch.float64)
    with torch.no_grad():
        model(torch.randn(1, 3, 192, 160, dtype=torch.float64))  # a sequence alone does not tell its map
        found = model.blocks[0].attn(tokens)
        assert torch.equal(found, core(tokens.unflatten(1, (12, 10))).flatten(1, 2))
        assert distance(found, donor_.blocks[0].attn(tokens)) > 1e-3


def test_a_pyramid_takes_maps_of_any_size():
    """Where maps are passed as maps, no sequence hides their sides."""
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, strict_img_size=False,
                              depths=(1, 1), num_heads=(2, 4), embed_dim=16, num_classes=5).eval()  # fmt: skip
    image, other = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 96, 64)
    for target in ("neighborhood", "aggregated", "cross_scale"):
        rewritten = attnrewrite.convert(model, target, image, official=True, fidelity="fresh")
        assert rewritten.forward_features(other).shape == (2, 12, 8, 32)
        assert distance(logits(rewritten, other)[1:], logits(rewritten, other[1:])) < 1e-5
        if target != "cross_scale":
            assert maps_of(rewritten, other) == {(24, 16), (12, 8)}


def test_what_is_taken_out_leaves_no_weight():
    """Also where the module reads its weights itself, without a call of a child."""
    model = published("vit, torchvision", "aggregated", pool=2)
    attention = model.encoder.layers[0].self_attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert {name for name, _ in attention.named_parameters()} == {
        f"attnrewrite_attention.{name}" for name, _ in attention.attnrewrite_attention.named_parameters()
    }
    block = published("swin", "aggregated", pool=2).layers[0].blocks[0]
    assert block.attn.relative_position_bias_table is None
    assert isinstance(block.attn.qkv, RemovedModule)


def test_inplace_takes_the_same_weights_out():
    model = copy.deepcopy(donor("vit, torchvision"))
    attnrewrite.convert(
        model, "aggregated", images("vit, torchvision"), official=True, fidelity="fresh", pool=2, inplace=True
    )
    counts = attnrewrite.report(model).sites[0].parameters
    assert counts == attnrewrite.report(published("vit, torchvision", "aggregated", pool=2)).sites[0].parameters
    assert list(attnrewrite.revert(model).state_dict()) == list(donor("vit, torchvision").state_dict())


def test_calibration_passes_over_what_was_replaced():
    for target in ("neighborhood", "conv_glu"):
        name = "vit, average, wide"
        model = attnrewrite.convert(donor(name), target, images(name), official=True, calibrate=images(name, 16))
        done = attnrewrite.report(model).calibration
        assert done.after.logits <= done.before.logits
        replaced = "attn" if target == "neighborhood" else "mlp"
        assert all("was replaced" in what for site, what in done.sites.items() if site.endswith(replaced))


@pytest.mark.parametrize("recipe", ["transnext", "rmt", "crossformer", "nat", "dinat", "t2t"])
def test_recipes_hand_it_on(recipe):
    name = "vit, average, wide"
    rows = attnrewrite.report(published(name, recipe)).sites
    assert {row.status for row in rows if row.target} == {"converted"}
    assert all(row.settings["official"] for row in rows if row.target)
    kinds = {"transnext": 4, "rmt": 2, "crossformer": 3, "nat": 2, "dinat": 2, "t2t": 1}
    assert sum(row.status == "converted" for row in rows) == kinds[recipe]


FAULTS = {
    "the kernel's center moved": lambda core: core.dwconv.dwconv.weight.data.copy_(
        core.dwconv.dwconv.weight.roll(1, -1)
    ),
    "values before gates": lambda core: core.fc1.weight.data.copy_(core.fc1.weight.roll(len(core.fc1.weight) // 2, 0)),
    "a dropped bias": lambda core: core.fc2.bias.data.zero_(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_unit_is_not_installed(fault):
    class Faulty(ConvGlu):
        def convert(self, site, index, weights):
            conversion = super().convert(site, index, weights)
            FAULTS[fault](conversion.core)
            return conversion

    with pytest.raises(ConversionError, match="differs from the original"):
        attnrewrite.convert(donor("vit"), Faulty(hidden="keep", official=True), images("vit"))


def test_a_wrong_stem_is_not_installed():
    class Faulty(CrossScale):
        def convert(self, site, index, weights):
            conversion = super().convert(site, index, weights)
            conversion.core.norm.bias.data.add_(0.1)
            return conversion

    with pytest.raises(ConversionError, match="differs from the original"):
        attnrewrite.convert(donor("swin"), Faulty(official=True), images("swin"), sites="patch_embed.proj")
