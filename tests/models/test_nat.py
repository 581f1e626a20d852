"""NAT, DiNAT, DiNAT_s and the isotropic models: sizes, any image, small maps, precisions, official weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_checks import check_any_size, check_half_precision, check_head_in_parts
from torch.export import Dim

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import NAT, DiNATS, IsotropicNAT, create_model, list_models, load_official
from attnrewrite.modules.neighborhood_block import NeighborhoodAttention2d, PatchMerging
from attnrewrite.operators.index_rule import AxisRule

SIZES = {  # millions of parameters, as far as they are published
    "nat_mini": "19.98", "dinat_mini": "19.98", "nat_tiny": "27.90", "dinat_tiny": "27.90",
    "nat_small": "50.74", "dinat_small": "50.72", "nat_base": "89.77", "dinat_base": "89.77",
    "dinat_large": "200.9", "dinat_large_384": "200.9", "dinat_large_384_11x11": "201.1",
    "dinat_s_tiny": "28.29", "dinat_s_small": "49.61", "dinat_s_base": "87.77",
    "dinat_s_large": "196.5", "dinat_s_large_384": "196.5",
    "nat_isotropic_small": "22.0", "dinat_isotropic_small": "22.0",
    "nat_isotropic_base": "86.5", "dinat_isotropic_base": "86.5",
    "vitrpb_small": "22.1", "vitrpb_base": "86.6",
}  # fmt: skip
LEVELS = {
    "num_classes": 5, "embed_dim": 16, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "mlp_ratio": 2.0, "kernel_size": 3,
    "dilations": ((1, 4), (1, 2), (1,)),
}  # fmt: skip
FAMILIES = {
    NAT: {**LEVELS, "layer_scale": 0.5},
    DiNATS: LEVELS,
    IsotropicNAT: {
        "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "kernel_size": 3,
    },
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def small(family, **options):
    model = family(**{**FAMILIES[family], **options})
    for part in model.parameters():
        part.data.add_(0.1 * torch.randn_like(part))
    return model.eval()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_published_models(name):
    with torch.device("meta"):
        count = sum(part.numel() for part in create_model(name).parameters())
    digits = len(SIZES[name].partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == SIZES[name]


def test_names():
    assert set(SIZES) == set(list_models("*nat_*")) | set(list_models("vitrpb_*"))


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("nat_mini", [{1}, {1}, {1}, {1}]),
        ("dinat_tiny", [{1, 8}, {1, 4}, {1, 2}, {1}]),
        ("dinat_large_384", [{1, 13}, {1, 6}, {1, 3}, {1}]),
        ("dinat_large_384_11x11", [{1, 8}, {1, 4}, {1, 2}, {1}]),
        ("dinat_s_base", [{1, 8}, {1, 4}, {1, 2}, {1}]),
        ("dinat_s_large_384", [{1, 13}, {1, 6}, {1, 3}, {1}]),
    ],
)
def test_dilations_alternate_up_to_what_the_map_holds(name, levels):
    with torch.device("meta"):
        model = create_model(name)
    found = [[block.attn.dilation for block in level.blocks] for level in model.get_submodule(model.levels_name)]
    assert [set(level) for level in found] == levels
    assert all(level[::2] == [1] * len(level[::2]) for level in found)
    sides = (96, 48, 24, 12) if "384" in name else (56, 28, 14, 7)
    kernel_size = model.get_submodule(model.levels_name)[0].blocks[0].attn.kernel_size
    assert [max(level) for level in found] == [max(1, side // kernel_size) if max(level) > 1 else 1
                                               for side, level in zip(sides, found, strict=True)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "vitrpb_small"])
def test_a_smallest_model_at_224(name):
    model = create_model(name, num_classes=10)
    logits = model(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 10)
    logits.square().sum().backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())


@EVERY
@pytest.mark.parametrize("size", [(64, 96), (53, 75), (16, 17)])
def test_any_image_size_forward_and_backward(family, size):
    """In the smallest image most neighborhoods do not fit."""
    check_any_size(small(family), torch.randn(2, 3, *size), classes=5)


def written_out(attention, source):
    """Neighborhood attention by the index rule, query by query."""
    height, width = source.shape[1:3]
    query, key, value = attention.qkv(source).unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
    rules = []
    for side in (height, width):
        dilation = min(attention.dilation, side)
        rules.append(AxisRule(side, min(attention.kernel_size, side // dilation), dilation=dilation))
    output, center = torch.empty_like(query), attention.kernel_size - 1
    for row in range(height):
        for column in range(width):
            keys = [(r, c) for r in rules[0].window(row) for c in rules[1].window(column)]
            scores = torch.stack([
                (query[:, row, column] * key[:, r, c]).sum(-1) * query.shape[-1] ** -0.5
                + attention.rpb[:, center + (r - row) // rules[0].dilation, center + (c - column) // rules[1].dilation]
                for r, c in keys
            ])  # fmt: skip
            values = torch.stack([value[:, r, c] for r, c in keys])
            output[:, row, column] = (scores.softmax(0).unsqueeze(-1) * values).sum(0)
    return attention.proj(output.flatten(-2))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_attention_on_any_map_also_where_the_neighborhood_does_not_fit(height, width, kernel_size, dilation):
    attention = NeighborhoodAttention2d(8, 2, kernel_size, dilation).double()
    attention.rpb.data.normal_()
    source = torch.randn(2, height, width, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attention(source), written_out(attention, source), rtol=0, atol=1e-10)


def test_a_kernel_of_the_whole_map_is_global_attention():
    """As the official ViT with relative position bias: its table is read by key minus query."""
    attention = NeighborhoodAttention2d(8, 2, 5).double()
    attention.rpb.data.normal_()
    source = torch.randn(2, 5, 5, 8, dtype=torch.float64)
    query, key, value = attention.qkv(source).flatten(1, 2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    place = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    offset = place[None, :] - place[:, None] + 4
    bias = attention.rpb[:, offset[..., 0], offset[..., 1]]
    mixed = F.scaled_dot_product_attention(query, key, value, bias.expand(2, -1, -1, -1)).transpose(1, 2)
    torch.testing.assert_close(attention(source), attention.proj(mixed.flatten(2)).unflatten(1, (5, 5)))


@pytest.mark.parametrize("rel_pos_bias", [True, False])
def test_gradcheck(rel_pos_bias):
    attention = NeighborhoodAttention2d(4, 2, 3, 2, rel_pos_bias=rel_pos_bias).double()
    source = torch.randn(1, 7, 5, 4, dtype=torch.float64, requires_grad=True)
    table = () if attention.rpb is None else (attention.rpb,)
    assert torch.autograd.gradcheck(lambda source, *_: attention(source), (source, *table))


def test_attention_exports_with_any_batch_and_size():
    attention = NeighborhoodAttention2d(8, 2, 3, 2)
    sizes = ({0: Dim("batch", max=64), 1: Dim("height", min=6, max=64), 2: Dim("width", min=6, max=64)},)
    exported = torch.export.export(attention, (torch.randn(2, 9, 12, 8),), dynamic_shapes=sizes).module()
    for shape in [(2, 9, 12), (3, 20, 7), (1, 6, 31)]:
        source = torch.randn(*shape, 8)
        torch.testing.assert_close(exported(source), attention(source))


def test_merging_takes_rows_before_columns():
    merging = PatchMerging(1).double()
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    source = torch.arange(9, dtype=torch.float64).view(1, 3, 3, 1)
    assert merging(source)[0].tolist() == [[[0, 3, 1, 4], [2, 5, 0, 0]], [[6, 0, 7, 0], [8, 0, 0, 0]]]


@EVERY
def test_the_head_in_parts(family):
    features, pooled = check_head_in_parts(small(family), torch.randn(2, 3, 64, 96))
    torch.testing.assert_close(pooled, features.flatten(1, 2).mean(1))


@EVERY
def test_feature_maps(family):
    model, image = small(family, num_classes=0), torch.randn(2, 3, 64, 96)
    maps = model.feature_maps(image)
    for level, info in zip(maps, model.feature_info, strict=True):
        reduction = info["reduction"]
        assert level.shape == (2, info["num_chs"], 64 // reduction, 96 // reduction)
        assert info["module"] in dict(model.named_modules())
    last = maps[-1].permute(0, 2, 3, 1)
    torch.testing.assert_close(last if family is IsotropicNAT else model.norm(last), model.forward_features(image))


@EVERY
def test_export_with_any_batch(family):
    model = small(family)
    exported = torch.export.export(model, (torch.randn(2, 3, 48, 64),), dynamic_shapes=({0: Dim("batch")},)).module()
    image = torch.randn(5, 3, 48, 64)
    torch.testing.assert_close(exported(image), model(image))


@EVERY
@HALF
def test_half_precision_and_autocast(family, dtype):
    check_half_precision(small(family), torch.randn(2, 3, 64, 96), dtype)


@pytest.mark.parametrize(
    ("name", "family"),
    [("dinat_large_384_11x11", NAT), ("dinat_s_tiny", DiNATS), ("vitrpb_small", IsotropicNAT)],
)
def test_official_weights_that_only_one_model_has(name, family):
    state = create_model(name, num_classes=11).state_dict() if name != "dinat_large_384_11x11" else None
    if state is None:
        with torch.device("meta"):
            state = create_model(name).state_dict()
        state = {key: torch.zeros(1).expand(part.shape) for key, part in state.items()}
    loaded = load_official({"state_dict": {f"module.{key}": part for key, part in state.items()}})
    assert type(loaded) is family
    assert torch.equal(loaded.head.weight, state["head.weight"])


@EVERY
def test_official_weights_by_name(family):
    name = {NAT: "dinat_mini", DiNATS: "dinat_s_tiny", IsotropicNAT: "dinat_isotropic_small"}[family]
    model, image = small(family), torch.randn(1, 3, 64, 64)
    state = {**model.state_dict()}
    if family is IsotropicNAT:
        state["layers.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    loaded = load_official(state, name, **FAMILIES[family]).eval()
    assert torch.equal(loaded(image), model(image))


def test_weights_do_not_tell_dilations():
    with torch.device("meta"):
        state = create_model("dinat_tiny").state_dict()
    with pytest.raises(CheckpointError, match=r"fits several models.*: nat_tiny, dinat_tiny$"):
        load_official(state)


def test_weights_of_another_kernel_are_refused():
    with pytest.raises(CheckpointError, match=r"attn\.rpb: expected \(1, 9, 9\), found \(1, 5, 5\)"):
        load_official(small(NAT).state_dict(), small(NAT, kernel_size=5))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (NAT, {"num_heads": (1, 2)}, "one entry per level"),
        (NAT, {"dilations": ((1,), (1, 2), (1,))}, "level 0 has 2 blocks, got 1"),
        (DiNATS, {"num_heads": (3, 2, 4)}, "num_heads: must divide dim=16, got 3"),
        (DiNATS, {"kernel_size": 0}, "kernel_size: must be at least 1"),
        (IsotropicNAT, {"dilation": 0}, "dilation: must be at least 1"),
    ],
)
def test_bad_arguments(family, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        small(family, **options)
