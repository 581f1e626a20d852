"""Faults planted in the cores: the comparisons with donors and definitions must see every one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attention_definitions as define
import pytest
import torch
from conversions import Case, case_name, converted, head_decay
from mixed_donors import mixed_donor
from repetition import thinned
from target_donors import distance, donor, images, logits
from torch import Tensor

import attnrewrite
from attnrewrite import cores
from attnrewrite.cores import aggregated, grouped, neighborhood
from attnrewrite.errors import ConversionError
from attnrewrite.ir.sites import Window
from attnrewrite.operators import BiasedProblem

Wrapped = Callable[..., Any]
MASKED = ("swin", "aggregated", {"windows": "mask"})
FIRST_BLOCKS = ("vit", "neighborhood", {"kernel_size": 3})


def with_bias(change: Callable[[Tensor], Tensor | None]) -> Callable[[Wrapped], Wrapped]:
    """A core that gets another bias than the site's."""

    def plant(forward: Wrapped) -> Wrapped:
        return lambda self, query, key, value, bias=None, *rest, **more: forward(
            self, query, key, value, None if bias is None else change(bias), *rest, **more
        )

    return plant


def flipped(bias: Tensor) -> Tensor:
    return bias.transpose(-1, -2)


def without_padding(forward: Wrapped) -> Wrapped:
    """Padded slots hold zeros after the projection, not before it."""
    return lambda self, query, key, value, bias=None, pad_key=None, pad_value=None: forward(
        self, query, key, value, bias, torch.zeros_like(pad_key), torch.zeros_like(pad_value)
    )


def begun_elsewhere(operator: Wrapped) -> Wrapped:
    """Regions that begin a token later than the map."""
    return lambda *parts, **more: operator(*parts, shift=1, **more)


def class_token_decays(terms: Wrapped) -> Wrapped:
    """The class token treated as one more token of the map, next to the first."""

    def wrong(problem: Any, *rows: Any) -> Tensor:
        bias, prefix = terms(problem, *rows).clone(), problem.prefix_tokens
        bias[:, :, :prefix] = bias[:, :, prefix : prefix + 1]
        return bias

    return wrong


def uncounted(cell_counts: Wrapped) -> Wrapped:
    return lambda *arguments: torch.ones_like(cell_counts(*arguments))


def class_token_counts(split_map: Wrapped) -> Wrapped:
    """The last token of the sequence taken for the class token."""
    return lambda part, grid: split_map(part.roll(1, 1), grid)


def whole_windows(same_block: Wrapped) -> Wrapped:
    """Everything in a token's window, whether or not it is in its block."""
    return lambda blocks, grid, size: same_block(Window((grid.height, grid.width)), grid, size)


def unshifted(same_block: Wrapped) -> Wrapped:
    return lambda blocks, grid, size: same_block(replace(blocks, shift=(0, 0)), grid, size)


def first_key_lost(operator: Wrapped) -> Wrapped:
    def lost(*parts: Any, additional_keys: Tensor, additional_values: Tensor, **more: Any) -> Any:
        return operator(*parts, additional_keys=None, additional_values=None, **more)

    return lost


KEPT_FAULTS: list[tuple[str, Case, object, str, Callable[[Wrapped], Wrapped]]] = [
    ("flipped table", ("swin", "long_short_distance", {}), cores.WindowAttention, "forward", with_bias(flipped)),
    ("dropped table", ("swin", "neighborhood", {}), cores.WindowAttention, "forward", with_bias(lambda bias: None)),
    ("wrong pad", ("swin, padded", "long_short_distance", {}), cores.WindowAttention, "forward", without_padding),
    ("flipped table", ("swin", "manhattan", {}), cores.ManhattanCore, "forward", with_bias(flipped)),
    ("dropped table", ("swin", "manhattan", {}), cores.ManhattanCore, "forward", with_bias(lambda bias: None)),
    ("flipped table", ("swin", "aggregated", {}), cores.AggregatedCore, "forward", with_bias(flipped)),
    ("dropped table", ("swin", "neighborhood", {"kernel_size": 4}), neighborhood, "reached_table",
     lambda table: lambda *arguments: torch.zeros_like(table(*arguments))),
    ("flipped table", MASKED, cores.MaskedAggregatedCore, "forward", with_bias(flipped)),
    ("no mask", MASKED, aggregated, "same_block", whole_windows),
    ("no shift", MASKED, aggregated, "same_block", unshifted),
    ("class token on the map", ("vit", "aggregated", {}), aggregated, "split_map", class_token_counts),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "owner", "attribute", "plant"),
    thinned([fault[1:] for fault in KEPT_FAULTS], 2),
    ids=[f"{fault[0]}, {case_name(fault[1])}" for fault in KEPT_FAULTS],
)
def test_a_fault_shows_against_the_donor(
    monkeypatch: pytest.MonkeyPatch, case: Case, owner: object, attribute: str, plant: Callable[[Wrapped], Wrapped]
) -> None:
    batch = images(case[0], 1, seed=4)
    model, expected = converted(case, "continuous"), logits(donor(case[0]), batch)
    assert distance(logits(model, batch), expected) <= 1e-12
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    assert distance(logits(model, batch), expected) > 1e-5


DEFINED_FAULTS: list[tuple[str, Case, Callable[..., Tensor | None], object, str, Callable[[Wrapped], Wrapped]]] = [
    ("class token on the map", ("vit", "manhattan", {"decay": 0.8}),
     lambda op: define.manhattan(op, head_decay(0.8, 3)), BiasedProblem, "terms_of_rows", class_token_decays),
    ("class token not seen", FIRST_BLOCKS, lambda op: define.neighborhood(op, (3, 3)),
     neighborhood, "neighborhood_attention", first_key_lost),
    ("wrong groups", ("vit", "long_short_distance", {"group_size": 3, "interval": 1}),
     lambda op: define.long_short_distance(op, (3, 3), (1, 1)), grouped, "grouped_attention", begun_elsewhere),
    ("flipped table", ("swin", "neighborhood", {"kernel_size": 3}), lambda op: define.neighborhood(op, (3, 3)),
     neighborhood, "reached_table", lambda table: lambda *arguments: table(*arguments).flip(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "definition", "owner", "attribute", "plant"),
    [fault[1:] for fault in DEFINED_FAULTS],
    ids=[f"{fault[0]}, {case_name(fault[1])}" for fault in DEFINED_FAULTS],
)
def test_a_fault_shows_against_the_definition(
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    definition: Callable[..., Tensor | None],
    owner: object,
    attribute: str,
    plant: Callable[[Wrapped], Wrapped],
) -> None:
    batch = images(case[0], 1, seed=4)
    model, expected = converted(case), logits(mixed_donor(donor(case[0]), definition), batch)
    assert distance(logits(model, batch), expected) <= 1e-10
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    assert distance(logits(model, batch), expected) > 1e-5


def test_uncounted_cells_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a pooled map that do not count once for each of their tokens."""
    case = ("vit", "aggregated", {"pool": (2, 4)})
    batch = images("vit", 1, seed=4)
    before = logits(converted(case), batch)
    monkeypatch.setattr(aggregated, "_cell_counts", uncounted(aggregated._cell_counts))
    assert distance(logits(converted(case), batch), before) > 1e-5


def test_dropout_is_not_hidden_by_eval_mode() -> None:
    """A target that cannot drop attention weights refuses a donor that does in training."""
    dropping = copy.deepcopy(donor("vit"))
    for block in dropping.blocks:
        block.attn.attn_drop.p = 0.1
    for target in ("aggregated", "manhattan_decomposed"):
        with pytest.raises(ConversionError, match="applies dropout to attention weights"):
            attnrewrite.convert(dropping, target, images("vit"))
