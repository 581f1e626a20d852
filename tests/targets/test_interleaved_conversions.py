"""Interleaved groups kept by ``identity``, as dilated neighborhoods and as long distance attention."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from group_donors import DONORS, HEADS, WHOLE, GroupAttention, GroupModel, difference, donor, images
from neighborhood_oracle import dilated_mask
from repetition import thinned
from torch import nn

import attnrewrite
from attnrewrite.cores import InterleavedAttention, SlidingAttention
from attnrewrite.errors import ConversionError
from attnrewrite.ir.sites import Grid

TARGETS = ("identity", "neighborhood", "dilated_neighborhood", "long_short_distance")
KEPT = [
    (name, target)
    for name in DONORS
    for target in TARGETS
    if name in WHOLE or target in ("identity", "long_short_distance")
]
QUICK = [
    ("timm", "identity"), ("timm", "neighborhood"), ("torchvision", "identity"), ("views", "neighborhood"),
    ("indexed", "long_short_distance"), ("no bias", "dilated_neighborhood"), ("regions", "long_short_distance"),
    ("padded", "identity"),
]  # fmt: skip
"""Every donor and every target once, most of them on models that the tests below convert anyway."""


@cache
def converted(name: str, target: str) -> nn.Module:
    """Shared, so never changed by a test."""
    return attnrewrite.convert(donor(name), target, images(name, 1), fidelity="exact", progress=False)


def rows(model: nn.Module) -> list[attnrewrite.report.SiteReport]:
    return [row for row in attnrewrite.report(model).sites if row.kind == "attention" and "interleaved" in row.source]


@pytest.mark.parametrize(
    ("name", "target"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in KEPT]
)
def test_the_function_is_kept_at_another_batch(name: str, target: str) -> None:
    model, batch = converted(name, target), images(name, 3, seed=5)
    assert [row.exactness for row in rows(model)] == ["EXACT"] * len(rows(model))
    assert rows(model)
    assert difference(model(batch), donor(name)(batch)) <= 1e-12


@pytest.mark.parametrize("name", thinned(["timm", "torchvision", "padded"], 3))
def test_the_function_is_kept_in_float32(name: str) -> None:
    plain, batch = copy.deepcopy(donor(name)).float(), images(name, 3, seed=6).float()
    for target in ("identity", "neighborhood") if name in WHOLE else ("identity",):
        model = attnrewrite.convert(plain, target, images(name, 1).float(), fidelity="exact", progress=False)
        assert difference(model(batch), plain(batch)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "target"), [("timm", "neighborhood"), ("torchvision", "identity"), ("padded", "identity")]
)
def test_gradients_are_kept(name: str, target: str) -> None:
    batch = images(name, 2, seed=7)
    gradients = []
    for model in (copy.deepcopy(converted(name, target)), copy.deepcopy(donor(name))):
        (model(batch) * torch.arange(1.0, 6.0)).square().sum().backward()
        gradients.append({full: parameter.grad for full, parameter in model.named_parameters()})
    actual, expected = gradients
    assert list(actual) == list(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for full, gradient in expected.items():
        assert (actual[full] is None) == (gradient is None), full
        if gradient is not None:
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            assert float((actual[full] - gradient).abs().max()) <= 1e-9 * scale, full


def test_operators_are_our_own() -> None:
    for target, core in (("identity", InterleavedAttention), ("neighborhood", SlidingAttention)):
        found = [module for module in converted("timm", target).modules() if type(module) is core]
        assert len(found) == 2
    (views,) = [m for m in converted("views", "neighborhood").modules() if isinstance(m, SlidingAttention)]
    assert (views.kernel_size, views.dilation) == ((4, 3), (2, 4))


@pytest.mark.parametrize("name", ["views", "torchvision"])
def test_another_map_is_refused_where_its_groups_are_not_known(name: str) -> None:
    height, width = DONORS[name][1]
    with pytest.raises(ConversionError, match=r"convert the model (again )?with example inputs"):
        converted(name, "identity")(torch.zeros(1, 3, 2 * height, 2 * width, dtype=torch.float64))


def attention_at(mixer: GroupAttention, grid: Grid, kernel: tuple[int, int], dilation: tuple[int, int]):
    """The dense definition: neighborhoods, with the table read by steps of the kernel, its edge repeated."""
    seen = dilated_mask(kernel, dilation, grid)
    cell = torch.arange(grid.tokens)
    places = [(cell // grid.width, 0), (cell % grid.width, 1)]
    steps = [torch.div(axis[:, None] - axis, dilation[n], rounding_mode="trunc") for axis, n in places]
    offsets = [step.clamp(1 - side, side - 1) for step, side in zip(steps, mixer.group, strict=True)]
    index = (offsets[0] + mixer.group[0] - 1) * (2 * mixer.group[1] - 1) + offsets[1] + mixer.group[1] - 1

    def run(x: torch.Tensor) -> torch.Tensor:
        q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = mixer.table[index].permute(2, 0, 1).masked_fill(~seen, -torch.inf)
        mixed = F.scaled_dot_product_attention(q, k, v, bias[None])
        return mixer.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])

    return run


@pytest.mark.parametrize(
    ("name", "options", "kernel", "dilation"),
    [
        ("regions", {}, (2, 3), (2, 2)),
        ("padded", {}, (2, 2), (2, 3)),
        ("regions", {"kernel_size": (3, 5), "dilation": 2}, (3, 5), (2, 2)),
        ("views", {"kernel_size": 2, "dilation": (2, 4)}, (2, 2), (2, 4)),
    ],
)
def test_other_kernels_are_projected_to_what_they_say(name, options, kernel, dilation) -> None:
    batch, source = images(name, 2, seed=8), donor(name)
    assert isinstance(source, GroupModel)
    model = attnrewrite.convert(source, "neighborhood", images(name, 1), progress=False, **options)
    (row,) = rows(model)
    assert (row.exactness, row.settings) == ("PROJECTED", {"kernel_size": kernel, "dilation": dilation})
    height, width = (side // 4 for side in DONORS[name][1])
    x = source.embed(batch).permute(0, 2, 3, 1)
    x = x + attention_at(source.mixer, Grid(height, width), kernel, dilation)(source.norm(x))
    assert difference(model(batch), source.head(x.square().mean((1, 2)))) <= 1e-12


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        ("neighborhood", {"kernel_size": 3}, "learned for tokens 2x4 apart; use dilation=(2, 4)"),
        ("dilated_neighborhood", {"dilation": 3}, "learned for tokens 2x4 apart"),
        ("neighborhood", {"official": True}, "interleaved(4x3, interval 2x4) groups, which spread over the map"),
        ("dilated_neighborhood", {"official": True}, "groups, which spread over the map"),
        ("manhattan", {}, "groups, which spread over the map"),
        ("manhattan_decomposed", {}, "groups, which spread over the map"),
        ("aggregated", {}, "groups, which spread over the map"),
        ("aggregated", {"windows": "mask"}, "groups, which spread over the map"),
        ("long_short_distance", {"interval": 3}, "groups; leave interval out, or exclude the site"),
        ("long_short_distance", {"official": True, "fidelity": "fresh"}, "groups, which spread over the map"),
    ],
)
def test_what_has_no_meaning_is_refused(target: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConversionError) as refusal:
        attnrewrite.convert(donor("views"), target, images("views", 1), progress=False, **options)
    assert reason in str(refusal.value)


def test_tokens_group_by_group_are_no_map_for_a_published_layer() -> None:
    with pytest.raises(ConversionError, match="arrive grouped and not as a map"):
        attnrewrite.convert(
            donor("torchvision"), "neighborhood", images("torchvision", 1), official=True, sites="*window_attention*"
        )


def test_recipes_keep_the_groups() -> None:
    for recipe, options in (("crossformer", {}), ("dinat", {"kernel_size": 2})):
        model = attnrewrite.convert(donor("timm"), recipe, images("timm", 1), progress=False, **options)
        assert [row.exactness for row in rows(model)] == ["EXACT"] * 2
