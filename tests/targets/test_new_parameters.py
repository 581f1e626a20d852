"""Parameters that a target adds: listed, counted, trained by every gradient, and of influence."""

from __future__ import annotations

import pytest
import torch
from conversions import Case, case_marks, case_name, converted, copied
from target_donors import distance, donor, images, logits, new_parameters

LOCAL = {"local.query_embedding": 24, "local.learnable_tokens": 216, "local.learnable_bias": 27}
"""Of 3 heads of 8 channels and a window of 3."""
LEPE = {"lepe.conv.weight": 24 * 25, "lepe.conv.bias": 24}
ADDED: list[tuple[Case, dict[str, int]]] = [
    (("vit, average", "aggregated", {}), LOCAL),
    (("vit, average", "aggregated", {"local_bias": -20.0}), LOCAL | {"local.relative_pos_bias_local": 27}),
    (("vit, average", "aggregated", {"pool": 2}), LOCAL | {"local.relative_pos_bias_local": 27}),
    (("vit, average", "manhattan", {}), LEPE),
    (("vit, average", "manhattan", {"lce": False}), {}),
    (("vit, average", "manhattan_decomposed", {"gate": True}), {"gate": 3} | LEPE),
    (("vit, average", "manhattan_decomposed", {"lce": False}), {}),
    (("vit, average", "long_short_distance", {"group_size": 3}), {}),
    (("vit, average", "neighborhood", {"kernel_size": 3}), {}),
]
TRAINED = [pytest.param(case, marks=case_marks(case)) for case, names in ADDED if names]
PLACE = "blocks.{}.attn.attnrewrite_attention."


@pytest.mark.parametrize(
    ("case", "added"), [pytest.param(*pair, marks=case_marks(pair[0]), id=case_name(pair[0])) for pair in ADDED]
)
def test_new_parameters_are_listed_and_counted(case: Case, added: dict[str, int]) -> None:
    found = {name: parameter.numel() for name, parameter in new_parameters(converted(case), donor(case[0])).items()}
    assert found == {PLACE.format(block) + name: count for block in range(2) for name, count in added.items()}


@pytest.mark.parametrize("case", [*TRAINED, ("pvt v2", "aggregated", {}), ("swin", "aggregated", {})], ids=case_name)
def test_gradients_reach_every_new_parameter(case: Case) -> None:
    model = copied(case).train()
    (model(images(case[0], 2, seed=9)) * torch.arange(1, 6)).square().sum().backward()
    new = new_parameters(model, donor(case[0]))
    assert new
    for name, parameter in new.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("case", TRAINED, ids=case_name)
def test_moving_any_new_parameter_changes_the_output(case: Case) -> None:
    model, batch = copied(case), images(case[0], 1)
    before = logits(model, batch)
    for name, parameter in new_parameters(model, donor(case[0])).items():
        start = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(start + torch.randn_like(start))
        assert distance(logits(model, batch), before) > 1e-12, name
        with torch.no_grad():
            parameter.copy_(start)
    assert torch.equal(logits(model, batch), before)


def test_the_last_block_before_a_class_token_is_dead() -> None:
    """Only the class token is read, and the new parameters act on the map: the one place where none can train."""
    model = copied(("vit", "manhattan", {}))
    model(images("vit")).square().sum().backward()
    touched = {n: bool(p.grad.abs().max() > 0) for n, p in new_parameters(model, donor("vit")).items()}
    assert touched == {PLACE.format(block) + name: block == 0 for block in range(2) for name in LEPE}
