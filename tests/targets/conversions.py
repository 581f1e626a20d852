"""Donors converted once each, and what their new parameters hold."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
from attention_definitions import LocalWeights
from target_donors import attention_rows, distance, donor, images, logits, new_parameters
from torch import Tensor, nn

import attnrewrite

Case = tuple[str, str, dict[str, Any]]

QUICK: list[Case] = [
    # which keep the function
    ("vit", "aggregated", {"local_bias": -20.0}),
    ("swin", "aggregated", {"windows": "mask"}),
    ("pvt v2", "aggregated", {}),
    ("vit, qk norm", "manhattan", {"lce": False}),
    ("vit, registers", "manhattan_decomposed", {"gate": True, "decay": "official"}),
    ("swin, padded", "long_short_distance", {}),
    ("vit, registers", "neighborhood", {"kernel_size": (4, 5), "oversize": "error"}),
    # which change it
    ("vit", "aggregated", {"pool": 2}),
    ("pvt v2", "aggregated", {"local_bias": 0.0}),
    ("vit, registers", "manhattan", {"decay": 0.7, "placement": "outside"}),
    ("vit, average", "manhattan_decomposed", {"decay": 0.8, "gate": True}),
    ("vit", "long_short_distance", {"group_size": 3}),
    ("vit, large map", "neighborhood", {"kernel_size": 3, "dilation": (2, 3)}),
    ("swin", "neighborhood", {"kernel_size": 3}),
    ("pvt v2", "neighborhood", {"kernel_size": 3, "reduced_keys": "refit"}),
    ("vit", "dilated_neighborhood", {"kernel_size": 2}),
    # whose new parameters are counted
    ("vit, average", "aggregated", {"local_bias": -20.0}),
    ("vit, average", "manhattan", {}),
    ("vit, average", "manhattan_decomposed", {"gate": True}),
    ("vit, average", "neighborhood", {"kernel_size": 3}),
    # of MLPs and stems
    ("vit", "conv_glu", {}),
    ("vit, swiglu and norm", "conv_glu", {}),
    ("swin, torchvision", "conv_glu", {}),
    ("pvt v2", "conv_glu", {}),
    ("swin, torchvision", "cross_scale", {}),
    ("vit", "tokens_to_token", {}),
    ("vit, torchvision", "tokens_to_token", {"mode": "exact", "kind": "performer"}),
    ("vit", "conv_glu", {"hidden": "match"}),
    ("pvt v2", "cross_scale", {}),
    ("vit", "tokens_to_token", {"mode": "fit"}),
]
"""The conversions of every run; the others repeat them on other donors or with other options, in the long one."""


def case_marks(case: Case) -> list[pytest.MarkDecorator]:
    return [] if case in QUICK else [pytest.mark.slow]


def case_name(case: Case) -> str:
    donor_name, target, options = case
    return " ".join([donor_name, "->", target, *(f"{name}={value}" for name, value in options.items())])


@cache
def _converted(name: str, target: str, options: tuple[tuple[str, Any], ...], fidelity: str) -> nn.Module:
    return attnrewrite.convert(donor(name), target, images(name), fidelity=fidelity, **dict(options))


def converted(case: Case, fidelity: str = "projected") -> nn.Module:
    """Shared by all tests of a case, so never changed by one."""
    name, target, options = case
    return _converted(name, target, tuple(options.items()), fidelity)


def copied(case: Case, fidelity: str = "projected") -> nn.Module:
    return copy.deepcopy(converted(case, fidelity))


def float32_distance(case: Case, **options: Any) -> float:
    """Of a conversion made in float32 from its donor, on a batch."""
    name, target, own = case
    batch, plain = images(name, dtype=torch.float32), copy.deepcopy(donor(name)).float()
    rewritten = attnrewrite.convert(plain, target, batch, **own, **options)
    return distance(logits(rewritten, batch), logits(plain, batch))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def learned(model: nn.Module, name: str) -> list[dict[str, Tensor]]:
    """The new parameters of every attention, in order, by the end of their names; none where nothing was converted."""
    rows = attention_rows(model)
    found: list[dict[str, Tensor]] = [{} for _ in rows]
    for full, parameter in new_parameters(model, donor(name)).items():
        place, _, own = full.partition(".attnrewrite_attention.")
        (index,) = (i for i, row in enumerate(rows) if f"{row.name}.".startswith(f"{place}."))
        found[index][own.removeprefix("core.").removeprefix("local.")] = parameter.detach()
    return found


def local_weights(new: dict[str, Tensor]) -> LocalWeights:
    return LocalWeights(
        new["query_embedding"], new["learnable_tokens"], new["learnable_bias"], new.get("relative_pos_bias_local")
    )


def head_decay(decay: float | str | None, heads: int) -> Tensor:
    """``[heads]`` a step; RMT's first stages are ``1 - 2 ** -(2 + 4 n / heads)``."""
    if decay == "official":
        return torch.tensor([1 - 2 ** -(2 + 4 * head / heads) for head in range(heads)], dtype=torch.float64)
    return torch.full((heads,), 1.0 if decay is None else float(decay), dtype=torch.float64)


def assert_state_carries(model: nn.Module, other: nn.Module, batch: Tensor) -> None:
    """``other`` computes something else, and with the state of ``model`` the same."""
    assert distance(logits(other, batch), logits(model, batch)) > 1e-6
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch), logits(model, batch))
