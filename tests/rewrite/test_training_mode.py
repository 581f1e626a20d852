"""Dropout, drop path and training mode survive a conversion."""

from __future__ import annotations

import pytest
import torch
from model_queries import run
from pairs import VITS, converted_from
from small_models import difference, images, small_model

import attnrewrite

DROPOUTS = [
    ("timm_vit", {"attn_drop_rate": 0.5}),
    ("timm_swin", {"attn_drop_rate": 0.5}),
    ("torchvision_vit", {"dropout": 0.5}),
    ("transformers_vit_eager", {"attention_probs_dropout_prob": 0.5}),
]
SLOW_DROPOUTS = [
    ("timm_vit", {"proj_drop_rate": 0.5}),
    ("torchvision_vit", {"attention_dropout": 0.5}),
    ("transformers_vit", {"attention_probs_dropout_prob": 0.5}),
    ("transformers_vit", {"hidden_dropout_prob": 0.5}),
    ("transformers_swin", {"attention_probs_dropout_prob": 0.5}),
    ("torchvision_swin", {"attention_dropout": 0.5}),
    ("timm_vit_unfused", {"attn_drop_rate": 0.5}),
    ("timm_swin", {"proj_drop_rate": 0.5}),
    ("torchvision_swin", {"dropout": 0.5}),
    ("transformers_swin", {"hidden_dropout_prob": 0.5}),
]


def spread(model, batch):
    """Mean and standard deviation of the logits over independent draws of whatever is random in training."""
    torch.manual_seed(3)
    model.train()
    drawn = run(model, batch[:1].expand(128, -1, -1, -1))
    model.eval()
    return drawn.mean(0), drawn.std(0)


@pytest.mark.parametrize(
    ("name", "rates"), DROPOUTS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_DROPOUTS], ids=str
)
def test_dropout_stays_live_and_as_strong(name, rates):
    donor, batch = small_model(name, **rates).float(), images(name, 1, torch.float32)
    mean, deviation = spread(donor, batch)
    assert float(deviation.min()) > 0.0
    to = "neighborhood" if "swin" in name and "att" in next(iter(rates)) else "identity"
    converted = attnrewrite.convert(donor, to, batch)
    assert torch.equal(run(converted, batch), run(converted, batch))
    assert difference(run(converted, batch), run(donor, batch)) < 1e-4
    found_mean, found_deviation = spread(converted, batch)
    ratio = float((found_deviation / deviation).log().mean().exp())
    assert 0.8 < ratio < 1.25, f"{to}: the deviation is {ratio:.2f} of the original's"
    assert float(((found_mean - mean).abs() / deviation).max()) < 0.6


@pytest.mark.parametrize("name", VITS)
def test_a_smaller_kernel_keeps_attention_dropout(name):
    rates = {"timm": "attn_drop_rate", "torc": "attention_dropout", "tran": "attention_probs_dropout_prob"}
    donor = small_model(name, **{rates[name[:4]]: 0.5})
    converted = converted_from(donor, name, "neighborhood")
    first, second = (run(converted.train(), images(name)) for _ in range(2))
    assert difference(first, second) > 1e-3
    converted.eval()
    assert torch.equal(run(converted, images(name)), run(converted, images(name)))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("timm_vit", {"drop_path_rate": 0.5}),
        pytest.param("timm_swin", {"drop_path_rate": 0.5}, marks=pytest.mark.slow),
        pytest.param("torchvision_swin", {"stochastic_depth_prob": 0.5}, marks=pytest.mark.slow),
        ("transformers_swin", {"drop_path_rate": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_drop_path_draws_as_the_original_does(name, rates):
    donor, to = small_model(name, **rates), "neighborhood" if name == "torchvision_swin" else "identity"
    converted = attnrewrite.convert(donor, to, images(name, 1))
    still = run(converted, images(name, 6))
    drawn = []
    for model in (donor, converted):
        torch.manual_seed(11)
        drawn.append(run(model.train(), images(name, 6)))
    assert difference(drawn[0], still) > 1e-3
    assert difference(drawn[1], drawn[0]) < 1e-12


@pytest.mark.parametrize("name", ["timm_vit", "transformers_swin"])
def test_a_model_converted_in_training_mode_stays_in_it(name):
    donor = small_model(name).train()
    next(donor.children()).eval()
    converted = converted_from(donor, name, "identity")
    for path, module in donor.named_modules():
        assert converted.get_submodule(path).training == module.training, path
    modes = {path: module.training for path, module in converted.named_modules()}
    for path, module in converted.named_modules():
        for child in module.attnrewrite_rewriting.modules if hasattr(module, "attnrewrite_rewriting") else ():
            assert modes[f"{path}.{child}".lstrip(".")] == module.training
