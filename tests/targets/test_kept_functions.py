"""EXACT and CONTINUOUS conversions: the donor's function at other batches, in training, in copies and in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from conversions import (
    Case,
    assert_state_carries,
    case_marks,
    case_name,
    converted,
    copied,
    float32_distance,
    through_a_file,
)
from target_donors import attention_rows, distance, donor, images, logits
from torch import nn

import attnrewrite

EXACT, CONTINUOUS = "EXACT", "CONTINUOUS"
CLOSED = {"local_bias": -20.0}
"""A window that takes part in the softmax with e ** -20 of the weight."""
KEEP = {"reduced_keys": "keep"}

# case: the classes of the sites that keep the function
KEPT: list[tuple[Case, list[str]]] = [
    (("vit", "aggregated", {}), [EXACT] * 2),
    (("vit", "aggregated", CLOSED), [CONTINUOUS] * 2),
    (("vit, large map", "aggregated", {"pool": 1, "window_size": 5}), [EXACT] * 2),
    (("vit, registers", "aggregated", {}), [EXACT] * 2),
    (("swin", "aggregated", {}), [EXACT] * 2),
    (("swin", "aggregated", CLOSED), [CONTINUOUS] * 2),
    (("pvt v2", "aggregated", {}), [EXACT] * 4),
    (("pvt v2", "aggregated", CLOSED), [CONTINUOUS] * 4),
    (("pvt v2, linear", "aggregated", {}), [EXACT] * 4),
    (("pvt v1, twins", "aggregated", {}), [EXACT] * 4),
    (("pvt v1, transformers", "aggregated", {}), [EXACT] * 4),
    (("vit, torchvision", "aggregated", {}), [EXACT] * 2),
    (("vit", "manhattan", {}), [CONTINUOUS] * 2),
    (("vit, registers", "manhattan", {"placement": "outside"}), [CONTINUOUS] * 2),
    (("vit, qk norm", "manhattan", {"lce": False}), [CONTINUOUS] * 2),
    (("swin", "manhattan", {}), [CONTINUOUS] * 2),
    (("pvt v2", "manhattan", KEEP), [CONTINUOUS] * 4),
    (("pvt v2, linear", "manhattan", KEEP), [CONTINUOUS] * 4),
    (("swin", "aggregated", {"windows": "mask"}), [EXACT] * 4),
    (("swin, torchvision", "aggregated", {"windows": "mask"}), [EXACT] * 4),
    (("swin, transformers", "aggregated", {"windows": "mask"}), [EXACT] * 4),
    (("vit, transformers", "manhattan", {}), [CONTINUOUS] * 2),
    (("vit", "manhattan_decomposed", {"gate": True}), [CONTINUOUS] * 2),
    (("vit, registers", "manhattan_decomposed", {"gate": True, "decay": "official"}), [CONTINUOUS] * 2),
    (("vit", "long_short_distance", {}), [EXACT] * 2),
    (("vit, registers", "long_short_distance", {"group_size": (4, 5), "interval": 2}), [EXACT] * 2),
    (("swin", "long_short_distance", {}), [EXACT] * 4),
    (("swin, padded", "long_short_distance", {}), [EXACT] * 4),
    (("swin, torchvision", "long_short_distance", {}), [EXACT] * 4),
    (("swin, transformers", "long_short_distance", {}), [EXACT] * 4),
    (("vit, average", "neighborhood", {}), [EXACT] * 2),
    (("vit, registers", "neighborhood", {"kernel_size": (4, 5), "oversize": "error"}), [EXACT] * 2),
    (("swin, padded", "neighborhood", {}), [EXACT] * 4),
    (("swin", "neighborhood", {"kernel_size": 4}), [EXACT] * 2),
    (("pvt v2", "neighborhood", {}), [EXACT] * 4),
    (("vit, transformers", "dilated_neighborhood", {}), [EXACT] * 2),
]
CASES = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=case_marks(case), id=case_name(case)) for case, _ in KEPT]
)
FEW = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=case_marks(case), id=case_name(case))
        for case, _ in KEPT
        if case[0] in ("vit", "swin", "swin, padded") or case == ("pvt v2", "aggregated", {})
    ],
)


def kept(case: Case) -> nn.Module:
    return converted(case, "continuous")


def tolerance(case: Case) -> float:
    return 1e-8 if "local_bias" in case[2] else 1e-12


@pytest.mark.parametrize(
    ("case", "classes"), [pytest.param(*pair, marks=case_marks(pair[0]), id=case_name(pair[0])) for pair in KEPT]
)
def test_the_class_is_reported(case: Case, classes: list[str]) -> None:
    rows = attention_rows(kept(case))
    assert [row.exactness for row in rows if row.status == "converted"] == classes
    assert all("below fidelity" in row.why or row.status == "refused" for row in rows if row.status != "converted")


@CASES
def test_the_function_is_kept_at_another_batch_size(case: Case) -> None:
    batch = images(case[0], 3, seed=5)
    assert distance(logits(kept(case), batch), logits(donor(case[0]), batch)) <= tolerance(case)


@CASES
def test_the_function_is_kept_in_training(case: Case) -> None:
    batch = images(case[0], 3, seed=6)
    models = [copied(case, "continuous").train(), copy.deepcopy(donor(case[0])).train()]
    assert distance(*(logits(model, batch) for model in models)) <= tolerance(case)


@FEW
def test_the_function_is_kept_in_float32(case: Case) -> None:
    assert float32_distance(case, fidelity="continuous") <= 2e-5


@CASES
def test_copies_and_files_compute_the_same(case: Case) -> None:
    batch, model = images(case[0], 1, seed=7), kept(case)
    expected = logits(model, batch)
    assert torch.equal(logits(through_a_file(model), batch), expected)
    assert torch.equal(logits(copied(case, "continuous"), batch), expected)


@CASES
def test_the_state_dict_carries_everything(case: Case) -> None:
    batch, model, other = images(case[0], 1, seed=7), kept(case), copied(case, "continuous")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert_state_carries(model, other, batch)


@CASES
def test_revert_gives_the_donor_back(case: Case) -> None:
    name = case[0]
    reverted = attnrewrite.revert(copied(case, "continuous"))
    assert list(reverted.state_dict()) == list(donor(name).state_dict())
    for key, value in donor(name).state_dict().items():
        assert torch.equal(reverted.state_dict()[key], value), key
    batch = images(name, 1, seed=8)
    assert torch.equal(logits(reverted, batch), logits(donor(name), batch))
