"""MLPs and stems: the donor's function at other batches and sizes, in training, in copies and in float32; revert."""

from __future__ import annotations

import copy
from typing import Any

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
from site_donors import rows_of
from target_donors import distance, donor, images, logits

import attnrewrite

EXACT, CONTINUOUS, PROJECTED = "EXACT", "CONTINUOUS", "PROJECTED"
PERFORMER = {"mode": "exact", "kind": "performer"}

# case: the class of its sites
KEPT: list[tuple[Case, str]] = [
    (("vit", "conv_glu", {}), EXACT),
    (("vit, registers", "conv_glu", {}), EXACT),
    (("vit, average", "conv_glu", {}), EXACT),
    (("vit, torchvision", "conv_glu", {}), EXACT),
    (("vit, transformers", "conv_glu", {}), EXACT),
    (("vit, packed gate", "conv_glu", {}), EXACT),
    (("vit, swiglu", "conv_glu", {}), EXACT),
    (("vit, swiglu and norm", "conv_glu", {}), EXACT),
    (("swin", "conv_glu", {}), EXACT),
    (("swin, torchvision", "conv_glu", {}), EXACT),
    (("swin, transformers", "conv_glu", {}), EXACT),
    (("pvt v2", "conv_glu", {}), EXACT),
    (("pvt v2, linear", "conv_glu", {}), EXACT),
    (("vit", "cross_scale", {}), EXACT),
    (("vit, transformers", "cross_scale", {}), EXACT),
    (("swin, torchvision", "cross_scale", {}), EXACT),
    (("swin, transformers", "cross_scale", {}), EXACT),
    (("swin, padded", "cross_scale", {}), EXACT),
    (("pvt v1, transformers", "cross_scale", {}), EXACT),
    (("vit", "tokens_to_token", {}), CONTINUOUS),
    (("vit, transformers", "tokens_to_token", {"mode": "exact"}), EXACT),
    (("vit, torchvision", "tokens_to_token", PERFORMER), EXACT),
]
CHANGED: list[tuple[Case, str]] = [
    (("vit", "conv_glu", {"hidden": "match"}), PROJECTED),
    (("pvt v2", "conv_glu", {"hidden": "match"}), PROJECTED),
    (("pvt v2", "cross_scale", {}), PROJECTED),
    (("vit", "tokens_to_token", {"mode": "fit"}), PROJECTED),
]
KINDS = {"conv_glu": "mlp", "cross_scale": "stem", "tokens_to_token": "stem"}


def params(cases: list[tuple[Case, str]]) -> list[Any]:
    return [pytest.param(case, marks=case_marks(case), id=case_name(case)) for case, _ in cases]


KEEPING = pytest.mark.parametrize("case", params(KEPT))
EVERY = pytest.mark.parametrize("case", params(KEPT + CHANGED))


@pytest.mark.parametrize(
    ("case", "exactness"),
    [pytest.param(*pair, marks=case_marks(pair[0]), id=case_name(pair[0])) for pair in KEPT + CHANGED],
)
def test_every_site_is_converted_in_its_class(case: Case, exactness: str) -> None:
    sites = [site for site in attnrewrite.report(converted(case)).sites if site.kind == KINDS[case[1]]]
    assert sites
    assert {site.status for site in sites} == {"converted"}
    assert {site.exactness for site in sites} == {exactness}


@KEEPING
def test_the_function_is_kept_at_another_batch_size(case: Case) -> None:
    batch = images(case[0], 3, seed=5)
    assert distance(logits(converted(case), batch), logits(donor(case[0]), batch)) <= 1e-12


@KEEPING
def test_the_function_is_kept_in_training(case: Case) -> None:
    batch = images(case[0], 3, seed=6)
    models = [copied(case).train(), copy.deepcopy(donor(case[0])).train()]
    assert distance(*(logits(model, batch) for model in models)) <= 1e-12


@pytest.mark.parametrize(
    ("name", "target", "options", "size"),
    [
        ("vit, dynamic", "conv_glu", {}, (128, 192)),
        ("vit, dynamic", "cross_scale", {}, (128, 192)),
        ("vit, dynamic", "tokens_to_token", {}, (128, 192)),
        ("vit, dynamic", "tokens_to_token", {"mode": "exact"}, (32, 48)),
        ("pvt v2, any size", "conv_glu", {}, (96, 160)),
        ("swin, torchvision", "conv_glu", {}, (48, 40)),
        ("swin, torchvision", "cross_scale", {}, (46, 75)),
    ],
)
def test_the_function_is_kept_at_another_image_size(name: str, target: str, options: dict, size: tuple) -> None:
    batch = torch.randn(2, 3, *size, dtype=torch.float64)
    assert distance(logits(converted((name, target, options)), batch), logits(donor(name), batch)) <= 1e-12


@pytest.mark.parametrize(
    "case",
    [case for case, _ in KEPT if case[0] == "vit" or case[:2] == ("swin, torchvision", "cross_scale")],
    ids=case_name,
)
def test_the_function_is_kept_in_float32(case: Case) -> None:
    assert float32_distance(case) <= 2e-5


@EVERY
def test_copies_and_files_compute_the_same(case: Case) -> None:
    batch, model = images(case[0], 1, seed=7), converted(case)
    expected = logits(model, batch)
    assert torch.equal(logits(through_a_file(model), batch), expected)
    assert torch.equal(logits(copied(case), batch), expected)


@pytest.mark.parametrize("case", params([pair for pair in KEPT + CHANGED if pair[0][0] in ("vit", "pvt v2")]))
def test_the_state_dict_carries_everything(case: Case) -> None:
    """Also into the same conversion of a donor with other weights."""
    name, target, options = case
    batch, model, other = images(name, 1, seed=7), converted(case), copy.deepcopy(donor(name))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    other = attnrewrite.convert(other, target, images(name), **options)
    assert_state_carries(model, other, batch)


@EVERY
def test_revert_gives_the_donor_back(case: Case) -> None:
    name = case[0]
    reverted = attnrewrite.revert(copied(case))
    expected = donor(name).state_dict()
    assert list(reverted.state_dict()) == list(expected)
    assert [n for n, _ in reverted.named_modules()] == [n for n, _ in donor(name).named_modules()]
    for key, value in expected.items():
        assert torch.equal(reverted.state_dict()[key], value), key
    batch = images(name, 1, seed=8)
    assert torch.equal(logits(reverted, batch), logits(donor(name), batch))


@pytest.mark.parametrize("case", params(CHANGED))
def test_every_parameter_of_a_changed_site_is_used(case: Case) -> None:
    """What a whole core replaces is taken out, or distributed training would wait for its gradient."""
    model = copied(case)
    model(images(case[0])).square().sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not unused
    assert all(row.parameters["dropped"] for row in rows_of(model, KINDS[case[1]]))
