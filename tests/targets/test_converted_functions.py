"""Converted models, with new parameters away from their start, against attention written out by definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import attention_definitions as define
import pytest
import torch
from attention_definitions import Operands
from conversions import Case, case_marks, case_name, converted, copied, head_decay, learned, local_weights
from mixed_donors import mixed_donor, operands_of
from target_donors import attention_rows, distance, donor, images, logits, moved
from torch import Tensor, nn

New = dict[str, Tensor]
Definition = Callable[[Operands, New], Tensor]
OPEN, ABSENT = {"local_bias": 0.0}, {"local_bias": -torch.inf}


def neighborhood(kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Definition:
    return lambda op, new: (
        define.neighborhood(op, kernel, dilation) if op.reduced is None else define.reduced_neighborhood(op, kernel)
    )


def alternating(kernel: tuple[int, int]) -> Definition:
    """DiNAT: dilation 1, and the largest that fits, by turns."""

    def mix(op: Operands, new: New) -> Tensor:
        widest = (max(1, op.sides[0] // kernel[0]), max(1, op.sides[1] // kernel[1]))
        return define.neighborhood(op, kernel, widest if op.index % 2 else (1, 1))

    return mix


def groups(size: tuple[int, int], interval: tuple[int, int] | None = None) -> Definition:
    """Short and long distance by turns; the interval is the least with which one region covers the map."""

    def mix(op: Operands, new: New) -> Tensor:
        widest = (-(-op.sides[0] // size[0]), -(-op.sides[1] // size[1]))
        return define.long_short_distance(op, size, (interval or widest) if op.index % 2 else (1, 1))

    return mix


def long_where_shifted(op: Operands, new: New) -> Tensor | None:
    assert op.window is not None
    return groups(op.window)(op, new) if op.shifted else None


def manhattan(decay: float | str | None, placement: str = "inside") -> Definition:
    def mix(op: Operands, new: New) -> Tensor:
        heads = head_decay(decay, op.query.shape[2])
        if op.reduced is not None:
            return define.reduced_manhattan(op, heads)
        return define.manhattan(op, heads, placement) + enhancement(op, new)

    return mix


def decomposed(decay: float | str | None) -> Definition:
    def mix(op: Operands, new: New) -> Tensor:
        mixed = define.decomposed_manhattan(op, head_decay(decay, op.query.shape[2]))
        if "gate" in new:
            mixed = define.dense(op) + new["gate"] * (mixed - define.dense(op))
        return mixed + enhancement(op, new)

    return mix


def enhancement(op: Operands, new: New) -> Tensor | float:
    if "lepe.conv.weight" not in new:
        return 0.0
    return define.local_context(op, new["lepe.conv.weight"], new["lepe.conv.bias"])


def aggregated(window: int, pool: tuple[int, int]) -> Definition:
    def mix(op: Operands, new: New) -> Tensor:
        if op.reduced is not None:
            return define.reduced_aggregated(op, window, local_weights(new))
        cells = (1, 1) if op.sides == op.window else pool
        return define.aggregated(op, window, cells, local_weights(new))

    return mix


def masked(op: Operands, new: New) -> Tensor:
    return define.masked_windows(op, local_weights(new))


def on_pixels(definition: Definition) -> Definition:
    """Keys and values of every token by projections of their own, where the donor has reduced ones."""

    def mix(op: Operands, new: New) -> Tensor:
        if op.reduced is None:
            return definition(op, new)
        assert op.tokens is not None
        parts = {
            name: (op.tokens @ new[f"{name}.weight"].T + new[f"{name}.bias"]).unflatten(-1, op.query.shape[2:])
            for name in ("key", "value")
        }
        return definition(replace(op, reduced=None, **parts), new)

    return mix


REFIT = {"reduced_keys": "refit"}

# Each a case and what its converted attentions compute.
DEFINED: list[tuple[Case, Definition]] = [
    (("vit", "aggregated", {}), aggregated(3, (1, 1))),
    (("vit", "aggregated", {"pool": 2}), aggregated(3, (2, 2))),
    (("vit", "aggregated", {"pool": (4, 1), "window_size": 1} | ABSENT), aggregated(1, (4, 1))),
    (("vit, large map", "aggregated", {}), aggregated(3, (2, 2))),
    (("vit, registers", "aggregated", {"pool": (2, 1), "window_size": 5, "local_bias": -1.0}), aggregated(5, (2, 1))),
    (("vit, average", "aggregated", {"pool": 1} | OPEN), aggregated(3, (1, 1))),
    (("vit, qk norm", "aggregated", {"pool": 3}), aggregated(3, (3, 3))),
    (("swin", "aggregated", {}), aggregated(3, (1, 1))),
    (("swin", "aggregated", {"window_size": 7, "pool": 1} | OPEN), aggregated(7, (1, 1))),
    (("swin, padded", "aggregated", {"pool": 2, "window_size": 9}), aggregated(9, (2, 2))),
    (("swin", "aggregated", {"windows": "mask"}), masked),
    (("pvt v2", "aggregated", OPEN), aggregated(3, (1, 1))),
    (("pvt v2, linear", "aggregated", {"window_size": 5}), aggregated(5, (1, 1))),
    (("pvt v1, twins", "aggregated", {"local_bias": -2.0}), aggregated(3, (1, 1))),
    (("vit", "manhattan", {}), manhattan(None)),
    (("vit", "manhattan", {"decay": 0.8}), manhattan(0.8)),
    (("vit, registers", "manhattan", {"decay": "official", "lce": False}), manhattan("official")),
    (("vit, registers", "manhattan", {"decay": 0.7, "placement": "outside"}), manhattan(0.7, "outside")),
    (("swin", "manhattan", {"decay": 0.6}), manhattan(0.6)),
    (("swin", "manhattan", {"decay": 0.6, "placement": "outside"}), manhattan(0.6, "outside")),
    (("pvt v2", "manhattan", {"decay": 0.8, "reduced_keys": "keep"}), manhattan(0.8)),
    (("pvt v1, twins", "manhattan", {"decay": "official", "reduced_keys": "keep"}), manhattan("official")),
    (("vit", "manhattan_decomposed", {}), decomposed(None)),
    (("vit, registers", "manhattan_decomposed", {"decay": "official", "lce": False}), decomposed("official")),
    (("vit, average", "manhattan_decomposed", {"decay": 0.8, "gate": True}), decomposed(0.8)),
    (("vit", "long_short_distance", {"group_size": 3}), groups((3, 3))),
    (("vit, registers", "long_short_distance", {"group_size": (2, 3), "interval": (2, 1)}), groups((2, 3), (2, 1))),
    (("vit, large map", "long_short_distance", {}), groups((7, 7))),
    (("swin", "long_short_distance", {"shifted": "long"}), long_where_shifted),
    (("swin, padded", "long_short_distance", {"shifted": "long", "interval": 2}), None),
    (("vit", "neighborhood", {"kernel_size": 3}), neighborhood((3, 3))),
    (("vit, registers", "neighborhood", {"kernel_size": (2, 4)}), neighborhood((2, 4))),
    (("vit, large map", "neighborhood", {"kernel_size": 3, "dilation": (2, 3)}), neighborhood((3, 3), (2, 3))),
    (("swin", "neighborhood", {"kernel_size": 3}), neighborhood((3, 3))),
    (("swin", "neighborhood", {"kernel_size": (2, 3), "dilation": 2}), neighborhood((2, 3), (2, 2))),
    (("swin, padded", "neighborhood", {"kernel_size": 7}), neighborhood((7, 7))),
    (("swin, padded", "neighborhood", {"kernel_size": 3, "dilation": 3}), neighborhood((3, 3), (3, 3))),
    (("pvt v2", "neighborhood", {"kernel_size": (1, 2)}), neighborhood((1, 2))),
    (("pvt v2, linear", "neighborhood", {"kernel_size": 3}), neighborhood((3, 3))),
    (("pvt v2", "neighborhood", {"kernel_size": 3} | REFIT), on_pixels(neighborhood((3, 3)))),
    (("pvt v2, linear", "long_short_distance", {"group_size": 3} | REFIT), on_pixels(groups((3, 3)))),
    (("pvt v1, twins", "manhattan", {"decay": 0.8} | REFIT), on_pixels(manhattan(0.8))),
    (("pvt v2", "dilated_neighborhood", {"kernel_size": 2} | REFIT), on_pixels(alternating((2, 2)))),
    (("vit", "dilated_neighborhood", {"kernel_size": 2}), alternating((2, 2))),
    (("vit, registers", "dilated_neighborhood", {"kernel_size": 2, "dilation": (2, 1)}), neighborhood((2, 2), (2, 1))),
]  # fmt: skip


def by_two_where_shifted(op: Operands, new: New) -> Tensor | None:
    assert op.window is not None
    return groups(op.window, (2, 2))(op, new) if op.shifted else None


DEFINED = [(case, definition or by_two_where_shifted) for case, definition in DEFINED]
CASES = pytest.mark.parametrize(
    ("case", "definition"),
    [pytest.param(*pair, marks=case_marks(pair[0]), id=case_name(pair[0])) for pair in DEFINED],
)


def by_definition(case: Case, model: nn.Module, definition: Definition) -> nn.Module:
    """The donor with the definition in the place of what was converted in ``model``, new parameters included."""
    rows, news = attention_rows(model), learned(model, case[0])
    return mixed_donor(
        donor(case[0]), lambda op: definition(op, news[op.index]) if rows[op.index].status == "converted" else None
    )


@pytest.mark.parametrize("name", ["vit", "vit, registers", "vit, qk norm", "pvt v2", "pvt v2, linear", "pvt v1, twins"])
def test_dense_attention_in_their_place_is_the_donor(name: str) -> None:
    batch = images(name)
    assert distance(logits(mixed_donor(donor(name), define.dense), batch), logits(donor(name), batch)) <= 1e-12


@CASES
def test_the_converted_model_is_what_its_target_says(case: Case, definition: Definition) -> None:
    model = moved(copied(case), donor(case[0]))
    batch = images(case[0], 3, seed=3)
    expected = logits(by_definition(case, model, definition), batch)
    assert distance(expected, logits(donor(case[0]), batch)) > 1e-4, "too close to the donor to tell anything"
    assert distance(logits(model, batch), expected) <= 1e-10


@CASES
def test_reported_errors_are_what_an_independent_measurement_gives(case: Case, definition: Definition) -> None:
    news = learned(converted(case), case[0])
    for row, op in zip(attention_rows(converted(case)), operands_of(donor(case[0]), images(case[0])), strict=True):
        measured = row.status == "converted" and row.exactness != "EXACT" and op.window is None
        if not measured or (op.reduced is not None and case[1] == "aggregated"):
            assert row.error is None
            continue
        expected = define.dense(op)
        error = (definition(op, news[op.index]) - expected).abs().max() / expected.abs().max()
        assert row.error == pytest.approx(float(error), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        (("vit", "neighborhood", {"kernel_size": 3}), lambda op: define.neighbors(op, (3, 3))),
        (
            ("vit, large map", "neighborhood", {"kernel_size": 3, "dilation": (2, 3)}),
            lambda op: define.neighbors(op, (3, 3), (2, 3)),
        ),
        (("pvt v2", "neighborhood", {"kernel_size": (1, 2)}), lambda op: define.reduced_neighbors(op, (1, 2))),
        (
            ("vit", "long_short_distance", {"group_size": 3}),
            lambda op: define.grouped(op, (3, 3), (2, 2) if op.index else (1, 1)),
        ),
    ],
    ids=lambda value: case_name(value) if isinstance(value, tuple) else "",
)
def test_dropped_mass_is_the_attention_paid_to_lost_keys(case: Case, seen: Callable[[Operands], Tensor]) -> None:
    for row, op in zip(attention_rows(converted(case)), operands_of(donor(case[0]), images(case[0])), strict=True):
        if op.index == 3:  # the last stage of the pyramid is global
            op = replace(op, reduced=op.sides)
        weights = define.scores_of(op.query, op.key, op.scale).softmax(-1)
        lost = (weights * ~seen(op)).sum(-1).mean(dim=(0, 2))
        assert row.dropped_mass == pytest.approx(lost.tolist(), abs=2e-6)  # it is rounded, and summed in float32
        assert float(lost.min()) > 0.01
