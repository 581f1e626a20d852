"""``to="cross_scale"``: where filters lie, what is lost where kernels are too small, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from attnrewrite.patterns.targets.cross_scale import CrossScale
from conversions import converted, copied
from damaged_targets import assert_not_installed
from site_donors import new_cores, plan_of, rows_of
from target_donors import distance, donor, images, logits, moved
from torch import nn

import attnrewrite
from attnrewrite.errors import ArgumentError
from attnrewrite.modules.cross_scale import CrossScaleStem


def test_a_trained_stem_is_the_published_one():
    name = "swin, torchvision"
    model, expected = moved(copied((name, "cross_scale", {})), donor(name)), copy.deepcopy(donor(name))
    core = new_cores(model, "stem")[0]
    stem = CrossScaleStem(3, core.projs[0].out_channels * 2, (4, 8, 16, 32), norm=False).double()
    stem.projs.load_state_dict(core.projs.state_dict())
    batch = images(name)
    with torch.no_grad():
        assert distance(core(batch).permute(0, 2, 3, 1), stem(batch)) < 1e-12
        assert distance(core(batch), expected.features[0][0](batch)) > 1e-2


def test_a_trained_merge_takes_kernels_from_patchwise_normalized_pixels():
    """Against a loop over boxes: each is normalized by itself, then a kernel of 4 sees parts of nine of them."""
    name = "swin, torchvision"
    core = new_cores(moved(copied((name, "cross_scale", {})), donor(name)), "stem")[1]
    source = torch.randn(2, 6, 8, core.projs[0].in_channels, dtype=torch.float64)
    boxes = torch.zeros_like(source)
    with torch.no_grad():
        for row in range(0, 6, 2):
            for column in range(0, 8, 2):
                corners = [(row, column), (row + 1, column), (row, column + 1), (row + 1, column + 1)]  # Swin's order
                values = core.norm(torch.cat([source[:, r, c] for r, c in corners], dim=-1)).chunk(4, dim=-1)
                for (r, c), value in zip(corners, values, strict=True):
                    boxes[:, r, c] = value
        image = boxes.permute(0, 3, 1, 2)
        maps = [F.conv2d(image, conv.weight, conv.bias, 2, pad) for conv, pad in zip(core.projs, (0, 1), strict=True)]
        assert distance(core(source), torch.cat(maps, 1).permute(0, 2, 3, 1)) < 1e-12


@pytest.mark.parametrize("name", ["vit", "swin, torchvision", "pvt v2"])
def test_gradients_reach_the_whole_of_every_kernel(name):
    model = copied((name, "cross_scale", {}))
    model(images(name)).square().sum().backward()
    for core in new_cores(model, "stem"):
        for conv in core.projs:
            inside = conv.weight.grad.abs().amax(dim=(0, 1)) > 0
            assert inside.float().mean() > 0.5  # zeros are read beside a map that is smaller than the kernel
            assert bool((conv.bias.grad != 0).all())


def cut_to_scales(conv, kernels):
    """The donor's convolution with the taps gone that a channel's kernel has no place for; the energy that is left.

    Small kernels go to the channels that lose least.
    """
    weight, (stride, padding) = conv.weight.detach(), (conv.stride[0], conv.padding[0])
    taps = torch.arange(weight.shape[-1]) - padding  # pixels from the corner of the stride's box
    count, rest, total = len(weight), list(range(len(weight))), weight.square().sum()
    for number, size in enumerate(kernels):
        outer = (size - stride) // 2
        fits = ((taps >= -outer) & (taps < stride + outer)).to(weight)
        cut = weight * fits[:, None] * fits
        losses = (weight - cut).square().sum((1, 2, 3))
        width = count // 2 ** min(number + 1, len(kernels) - 1)
        chosen = sorted(rest, key=lambda channel: float(losses[channel]))[:width]
        weight[chosen] = cut[chosen]
        rest = [channel for channel in rest if channel not in chosen]
    assert not rest
    return float(weight.square().sum() / total)


def test_filters_that_do_not_fit_are_cut_where_it_costs_least():
    """PVT v2: of 7 x 7 filters the kernels of 4 and 8, of 3 x 3 those of 2; the donor with such filters is the same."""
    model, expected = converted(("pvt v2", "cross_scale", {})), copy.deepcopy(donor("pvt v2"))
    patches = [expected.patch_embed, *(stage.downsample for stage in expected.stages[1:])]
    kernels = [(4, 8, 16, 32), (2, 4), (2, 4), (2, 4)]
    kept = [cut_to_scales(patch.proj, sizes) for patch, sizes in zip(patches, kernels, strict=True)]
    batch = images("pvt v2")
    assert distance(logits(model, batch), logits(expected, batch)) < 1e-12
    assert distance(logits(model, batch), logits(donor("pvt v2"), batch)) > 1e-3
    rows = rows_of(model, "stem")
    assert [row.settings["kept_weight"] for row in rows] == pytest.approx(kept, abs=1e-6)
    assert {row.exactness for row in rows} == {"PROJECTED"}


@pytest.mark.parametrize(("kernels", "exactness"), [((10, 16), "EXACT"), ((12,), "EXACT"), ((8, 16), "PROJECTED")])
def test_kernels_decide_the_class(kernels, exactness):
    """A kernel holds a 7 x 7 filter padded by 3 from 10 on."""
    options = {"kernel_sizes": kernels, "sites": "patch_embed.proj"}
    model = attnrewrite.convert(donor("pvt v2"), "cross_scale", images("pvt v2"), **options)
    assert [row.exactness for row in rows_of(model, "stem")] == [exactness]
    error = distance(logits(model, images("pvt v2")), logits(donor("pvt v2"), images("pvt v2")))
    assert error < 1e-12 if exactness == "EXACT" else error > 1e-6


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (5, 4, 1), (2, 4, 0), (4, 4, 2), (3, 2, 1)])
@pytest.mark.parametrize("size", [(33, 47), (32, 30)])
def test_any_convolution_keeps_its_count_of_tokens(kernel, stride, padding, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, kernel, stride, padding), nn.Flatten(2)).double().eval()
    batch = torch.randn(2, 3, *size, dtype=torch.float64)
    rewritten = attnrewrite.convert(model, "cross_scale", batch[:1], kernel_sizes=(stride + 6, stride + 8))
    assert rows_of(rewritten, "stem")[0].exactness == "EXACT"
    assert distance(logits(rewritten, batch), logits(model, batch)) < 1e-12


FAULTS = {
    "a flipped kernel": lambda core: core.projs[1].weight.data.copy_(core.projs[1].weight.flip(-1)),
    "a filter off the center": lambda core: core.projs[1].weight.data.copy_(core.projs[1].weight.roll(1, -1)),
    "a wrong pad": lambda core: setattr(core.projs[1], "padding", (9, 9)),
    "a dropped bias": lambda core: core.projs[0].bias.data.zero_(),
    "channels in another order": lambda core: setattr(core, "order", torch.arange(24).flip(0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_core_is_not_installed(fault):
    assert_not_installed(CrossScale(), lambda conversion: FAULTS[fault](conversion.core))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit, patches of 14", {}, r"there are no default kernels for stride 14; pass kernel_sizes=\(14, 28\)"),
        (
            "vit",
            {"kernel_sizes": (4, 8)},
            r"kernels \(4, 8\) do not share the center of a 16x16 patch; use sizes",
        ),
        ("vit", {"kernel_sizes": (16, 19)}, r"do not share the center"),
        ("vit", {"kernel_sizes": (16, 18, 20, 22, 24)}, r"24 channels cannot be split by halves among 5 kernels"),
    ],
)
def test_what_cannot_be_is_refused_with_reason_and_remedy(name, options, reason):
    plan = plan_of(name, "cross_scale", **options)
    (stem,) = [planned for planned in plan.sites if planned.site.kind == "stem"]
    assert stem.status == "refused"
    assert re.search(reason, stem.why)


def test_patches_that_are_not_square_are_refused():
    plan = attnrewrite.plan(nn.Conv2d(3, 8, (4, 2), (4, 2)).eval(), "cross_scale", torch.randn(1, 3, 16, 16))
    assert plan.sites[0].status == "refused"
    assert "not square" in plan.sites[0].why


@pytest.mark.parametrize("sizes", [(8, 4), (4, 4), (), (4.0,), (0, 4), 4, "48"])
def test_wrong_kernels_are_no_argument(sizes):
    with pytest.raises(ArgumentError, match="kernel_sizes: expected ascending numbers"):
        CrossScale(kernel_sizes=sizes)
