"""Faults that no output shows: a softmax hides them, or a window that covers its map. Operands do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from lifted_models import Lifted
from random_weights import perturbed

from attnrewrite.ir.sites import AttentionSite, Window

Fault = Callable[[AttentionSite], AttentionSite]


def vit(**options) -> Lifted:
    sizes = {"img_size": (48, 80), "depth": 1, "embed_dim": 32, "num_heads": 4} | options
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    return Lifted(perturbed(model), torch.randn(2, 3, *sizes["img_size"]))


def covered(with_table: bool) -> Lifted:
    """One window that is the map; without a table the order of its tokens changes no output."""
    model = perturbed(
        timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=28, window_size=7, embed_dim=24, depths=(2,), num_heads=(2,)
        )
    )
    with torch.no_grad():
        for block in () if with_table else model.layers[0].blocks:
            block.attn.relative_position_bias_table.zero_()
    return Lifted(model, torch.randn(1, 3, 28, 28))


@pytest.fixture(scope="module")
def few() -> Lifted:
    return vit()


def with_row(site: AttentionSite, part: str, head: int, dim: int, row: int) -> AttentionSite:
    projection = getattr(site, part)
    rows = projection.rows.clone()
    rows[head, dim] = row
    return replace(site, **{part: replace(projection, rows=rows)})


def swapped(site: AttentionSite, part: str) -> AttentionSite:
    projection = getattr(site, part)
    return replace(site, **{part: replace(projection, rows=projection.rows.flip(0))})


FAULTS: dict[str, Fault] = {
    "no bias of the keys": lambda s: replace(s, key=replace(s.key, bias=None)),
    "no bias of the queries": lambda s: replace(s, query=replace(s.query, bias=None)),
    "heads of the keys swapped": lambda s: swapped(s, "key"),
    "heads of queries and keys swapped": lambda s: swapped(swapped(s, "query"), "key"),
    "one row of a value": lambda s: with_row(s, "value", 1, 3, int(s.value.rows[1, 4])),
    "one row of a key": lambda s: with_row(s, "key", 3, 0, int(s.key.rows[0, 0])),
    "another scale of the operands": lambda s: replace(s, scale_of_operands=1.001 * s.scale_of_operands),
    "another scale throughout": lambda s: replace(
        s, scale=1.001 * s.scale, scale_of_operands=1.001 * s.scale_of_operands
    ),
    "another scale of the site": lambda s: replace(s, scale=1.001 * s.scale),
    "queries in another order": lambda s: replace(s, queries=torch.arange(s.source_tokens).roll(1)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_operands_is_not_certified(few: Lifted, name: str) -> None:
    assert few.certificate(few.attention).passed
    assert not few.certificate(FAULTS[name](few.attention)).passed


@pytest.mark.parametrize("shift", [(3, 3), (3, 0), (0, 1)])
def test_a_shift_that_no_map_of_this_size_shows_is_not_certified(shift: tuple[int, int]) -> None:
    """Larger maps would be cut at it."""
    model = covered(with_table=True)
    site = model.attention
    assert site.keys == Window((7, 7), padding_keys=site.keys.padding_keys, rolled_first=site.keys.rolled_first)
    assert model.certificate(site).passed
    certificate = model.certificate(replace(site, keys=replace(site.keys, shift=shift)))
    assert not certificate.passed
    assert "shift" in str(certificate)


def test_another_order_of_tokens_in_a_window_that_covers_the_map_is_not_certified() -> None:
    model = covered(with_table=False)
    site = replace(model.attention, place=torch.arange(49))
    assert not bool(site.bias.values.any())
    assert model.certificate(site).passed
    for place in (torch.arange(49).roll(1), torch.arange(49).flip(0)):
        assert not model.certificate(replace(site, place=place)).passed


@pytest.mark.parametrize("row", [0, 23, 48])
def test_a_fault_in_one_row_of_the_scores_is_not_certified(row: int) -> None:
    """Where queries are few all of them are looked at."""
    model = covered(with_table=True)
    site = model.attention
    values = site.bias.values.clone()
    values[1, row, 5] += 1e-3
    assert not model.certificate(replace(site, bias=replace(site.bias, values=values))).passed
