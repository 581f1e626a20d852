"""The whole models by name, in timm's registry, and their weights out of official files."""

from __future__ import annotations

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from attnrewrite.errors import ArgumentError, CheckpointError
from attnrewrite.models import FeatureMaps, create_model, list_models, load_official

SMALL = {"depths": (1, 1, 1, 1), "num_classes": 5}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("crossformer_tiny", **SMALL).eval()


def test_every_model_is_in_timms_registry():
    assert set(list_models()) <= set(timm.list_models())
    assert len(list_models()) == len(set(list_models())) > 40


def test_timm_builds_the_same_model():
    ours = create_model("nat_mini", num_classes=7, in_chans=1)
    theirs = timm.create_model("nat_mini", num_classes=7, in_chans=1)
    assert type(theirs) is type(ours)
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


def test_timm_builds_feature_maps():
    model = timm.create_model("rmt_tiny", features_only=True, out_indices=(1, -1), depths=(1, 1, 1, 1)).eval()
    assert isinstance(model, FeatureMaps)
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(each.shape) for each in maps] == [(2, 128, 8, 12), (2, 512, 2, 3)]
    assert [level["reduction"] for level in model.feature_info] == [8, 32]


def test_no_weights_are_pretended_to_be_hosted():
    with pytest.raises(ArgumentError, match=r"pretrained: no weights of nat_tiny are hosted; .*load_official"):
        timm.create_model("nat_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transnext_tini", {}, r"name: unknown model, got 'transnext_tini'; did you mean 'transnext_tiny'\?"),
        ("nat_tiny", {"kernel_sise": 3}, r"kernel_sise: nat_tiny has no such option; did you mean 'kernel_size'\?"),
        ("nat_tiny", {"out_indices": (0,)}, r"out_indices: requires features_only=True"),
        ("nat_tiny", {"features_only": True, "out_indices": (4,)}, r"out_indices: there are 4 levels, got 4"),
        ("nat_tiny", {"num_classes": -1}, r"num_classes: must not be negative, got -1"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        create_model(name, **options)


def test_the_classifier_is_reset(model):
    image = torch.randn(2, 3, 64, 64)
    model.reset_classifier(9)
    assert model(image).shape == (2, 9)
    model.reset_classifier(0)
    assert model(image).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), model.forward_features(image))
    with pytest.raises(ArgumentError, match="global_pool: a classifier needs pooled features"):
        model.reset_classifier(3, "")
    with pytest.raises(ArgumentError, match="global_pool: CrossFormer pools by 'avg' or '', got 'max'"):
        model.reset_classifier(3, "max")


WRAPPERS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "config": argparse.Namespace(lr=1e-3)},
    "average first": lambda state: {"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state},
    "parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_come_out_of_their_wrappers(model, tmp_path, wrapper):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapper(model.state_dict()), path)
    loaded = load_official(path, "crossformer_tiny", depths=(1, 1, 1, 1)).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))  # also: five classes, told by the weights


def test_safetensors_and_a_model_that_is_already_built(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = create_model("crossformer_tiny", **SMALL)
    assert load_official(tmp_path / "weights.safetensors", other) is other
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_the_variant_is_found_by_its_shapes():
    source = create_model("crossformer_small")
    found = load_official(source.state_dict())
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}


def test_models_of_equal_shapes_have_to_be_named():
    weights = create_model("nat_mini").state_dict()
    with pytest.raises(CheckpointError, match=r"fits several models; pass model= with one of: .*nat_mini"):
        load_official(weights)


def test_another_models_weights_are_refused_and_nothing_is_loaded(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = create_model("crossformer_small").state_dict()
    with pytest.raises(CheckpointError, match=r"not of CrossFormer: .*expected \(32, 3, 4, 4\), found \(48, 3, 4, 4\)"):
        load_official(before | {n: t for n, t in wrong.items() if n.startswith("patch_embed")}, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint that can be read safely"),
        (b"plain text", "not a checkpoint that can be read safely"),
        (pickle.dumps({"model": Malicious()}), "not a checkpoint that can be read safely"),
    ],
    ids=["empty", "text", "malicious"],
)
def test_files_that_are_no_checkpoints(tmp_path, capsys, content, message):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_official(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere.pth", "no such file: nowhere.pth"),
        ({"model": {"epoch": 3}}, "no mapping of names to tensors"),
        ({}, "no mapping of names to tensors"),
        ({"conv1.weight": torch.zeros(1)}, r"of no family that is known here; pass model="),
    ],
)
def test_content_that_is_no_model(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        load_official(checkpoint)


def test_only_our_models_are_filled():
    with pytest.raises(ArgumentError, match="depths: the model is already built"):
        load_official({"a": torch.zeros(1)}, create_model("crossformer_tiny", **SMALL), depths=(1, 1, 1, 1))
    assert isinstance(create_model("crossformer_tiny", **SMALL).get_classifier(), nn.Linear)
