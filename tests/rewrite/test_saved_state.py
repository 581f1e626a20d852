"""Weights do not forget the conversion: strict loading into a model that was not converted alike reports it."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import difference, images, small_model
from torch import nn

import attnrewrite

LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("torchvision_swin", "timm_swin")]
PLAIN = ["timm_vit", "torchvision_vit", "transformers_vit"]
NAMES = [*PLAIN, *LONG]


def tuned(model):
    """The same with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return other


def run(model, x):
    with torch.no_grad():
        made = model(x)
    return getattr(made, "logits", made)


def converted(name, to="neighborhood", **options):
    donor = small_model(name).float()
    x = images(name, 1, torch.float32)
    return donor, attnrewrite.convert(donor, to, x, progress=False, **options), images(name, 2, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_donor_does_not_take_them_without_a_word(name):
    donor, model, _ = converted(name, kernel_size=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attnrewrite_converted_to_neighborhood"):
        donor.load_state_dict(model.state_dict())
    found = donor.load_state_dict(model.state_dict(), strict=False)
    assert len(found.unexpected_keys) >= 2
    assert all("attnrewrite_converted_to_neighborhood" in key for key in found.unexpected_keys)


@pytest.mark.parametrize(("name", "how"), [("timm_vit", "safetensors"), *((name, "torch.save") for name in PLAIN)])
def test_a_model_converted_alike_takes_them(name, how, tmp_path):
    model, batch = tuned(converted(name, kernel_size=3)[1]), images(name, 2, torch.float32)
    if how == "torch.save":
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        state = torch.load(tmp_path / "weights.pt", weights_only=True)
    else:
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        state = load_file(tmp_path / "weights.safetensors")
    again = attnrewrite.convert(small_model(name).float(), "neighborhood", batch[:1], kernel_size=3, progress=False)
    again.load_state_dict(state)
    assert torch.equal(run(again, batch), run(model, batch))


def test_one_converted_to_something_else_does_not():
    _, model, batch = converted("timm_vit", kernel_size=3)
    other = attnrewrite.convert(small_model("timm_vit").float(), "aggregated", batch[:1], progress=False)
    with pytest.raises(RuntimeError, match="attnrewrite_converted_to_neighborhood"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_donor_go_into_a_conversion_that_carries_them_all(name):
    donor, model, batch = converted(name, kernel_size=3)
    other = tuned(donor)
    model.load_state_dict(other.state_dict())
    expected = attnrewrite.convert(other, "neighborhood", batch[:1], kernel_size=3, progress=False)
    assert difference(run(model, batch), run(expected, batch)) < 1e-6


def test_state_that_was_converted_in_part_does_not_go_into_a_whole_conversion():
    donor, whole, batch = converted("timm_vit", kernel_size=3)
    part = attnrewrite.convert(donor, "neighborhood", batch[:1], keep="blocks.0*", kernel_size=3, progress=False)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(whole)))
    for model in (whole, copied):
        with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\.attnrewrite_converted_to_neighborhood"):
            model.load_state_dict(part.state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key"):
            nn.ModuleDict({"model": model}).load_state_dict(
                {f"model.{name}": value for name, value in part.state_dict().items()}
            )
        model.load_state_dict(donor.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attn\.attnrewrite_converted_to_neighborhood"):
        part.load_state_dict(whole.state_dict())
    assert not attnrewrite.revert(copied)._load_state_dict_pre_hooks


def test_a_model_that_is_itself_rewritten_tells_the_two_apart():
    """torchvision's ViT cuts its patches in the model's own code: the model reads its state before its children do."""
    donor, model, batch = converted("torchvision_vit", "identity")
    assert "attnrewrite_converted_to_identity" in model.state_dict()
    other = tuned(donor)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert difference(run(model, batch), run(other, batch)) < 1e-6
        model.load_state_dict(model.state_dict(keep_vars=True))
    state = model.state_dict()
    del state["attnrewrite_converted_to_identity"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"attnrewrite_converted_to_identity"'):
        model.load_state_dict(state)


def test_weights_of_the_donor_are_assigned_on_another_device():
    donor, model, _ = converted("timm_vit", kernel_size=3)
    model.to("meta").load_state_dict(donor.state_dict(), assign=True)
    assert not any(value.is_meta for value in model.state_dict().values())


def test_a_part_that_is_saved_alone_says_so_too():
    donor, model, _ = converted("timm_vit", kernel_size=3)
    with pytest.raises(RuntimeError, match="attnrewrite_converted_to_neighborhood"):
        donor.blocks.load_state_dict(model.blocks.state_dict())


def test_from_pretrained_reports_it(tmp_path):
    """transformers saves under names of its own: what is loaded is the donor with these weights, to be converted."""
    donor, model, batch = converted("transformers_vit", kernel_size=3)
    model.save_pretrained(tmp_path)
    loaded, told = type(donor).from_pretrained(tmp_path, output_loading_info=True)
    assert any("attnrewrite_converted_to_neighborhood" in key for key in told["unexpected_keys"])
    again = attnrewrite.convert(loaded.eval(), "neighborhood", batch[:1], kernel_size=3, progress=False)
    assert difference(run(again, batch), run(model, batch)) < 1e-6


def test_averages_and_copies_keep_it():
    _, model, batch = converted("timm_vit", kernel_size=3)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    moving = timm.utils.ModelEmaV3(model)
    for kept in (averaged, moving):
        for _ in range(3):
            (kept.update_parameters if kept is averaged else kept.update)(model)
        assert kept.module.state_dict().keys() == model.state_dict().keys()
        assert difference(run(kept.module, batch), run(model, batch)) < 1e-6
    assert copy.deepcopy(model).bfloat16().state_dict().keys() == model.state_dict().keys()


def test_revert_takes_it_back():
    donor, model, batch = converted("timm_swin")
    twice = attnrewrite.convert(model, "conv_glu", batch[:1], progress=False)
    assert {key.rpartition(".")[2] for key in twice.state_dict() if "attnrewrite_converted_to_" in key} == {
        "attnrewrite_converted_to_neighborhood",
        "attnrewrite_converted_to_conv_glu",
    }
    assert attnrewrite.revert(twice).state_dict().keys() == donor.state_dict().keys()
    assert attnrewrite.revert(model).state_dict().keys() == donor.state_dict().keys()
