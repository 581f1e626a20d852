import sys

import pytest
import torch

from attnrewrite.errors import ArgumentError
from attnrewrite.hosts.loading import load_model

OWN_FILE = """
from torch import nn
from neighbor import WIDTH

class Own(nn.Module):
    def __init__(self, width=WIDTH, pretrained=False):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.pretrained = pretrained

def number(): return 3
instance = Own()
"""


@pytest.fixture
def own_file(tmp_path):
    (tmp_path / "neighbor.py").write_text("WIDTH = 5\n")
    (tmp_path / "types.py").write_text(OWN_FILE)  # the name of a standard module, on purpose
    return tmp_path / "types.py"


@pytest.mark.parametrize(
    ("spec", "options", "image_size"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 1, "num_classes": 7}, 224),
        ("timm:vit_tiny_patch16_224.augreg_in21k", {"depth": 1, "num_classes": 7}, 224),
        ("vit_tiny_patch16_224", {"depth": 1, "num_classes": 7}, 224),
        ("torchvision:swin_t", {"num_classes": 7}, 64),
        ("swin_t", {"num_classes": 7}, 64),
        (
            "transformers:ViTForImageClassification",
            {"num_hidden_layers": 1, "num_labels": 7, "image_size": 32, "attn_implementation": "eager"},
            32,
        ),
    ],
)
def test_loads_models_of_the_libraries(spec, options, image_size):
    model = load_model(spec, **options).eval()
    output = model(torch.randn(1, 3, image_size, image_size))
    assert getattr(output, "logits", output).shape == (1, 7)


def test_weights_are_random():
    first, second = (load_model("timm:vit_tiny_patch16_224", depth=1) for _ in range(2))
    assert not torch.equal(first.head.weight, second.head.weight)


def test_loads_from_a_file(own_file):
    import types

    before = list(sys.path)
    model = load_model(f"{own_file}:Own", width=4)
    assert model.linear.in_features == 4
    assert not model.pretrained
    assert load_model(f"{own_file}:Own", pretrained=True).linear.in_features == 5
    assert load_model(f"{own_file}:Own", pretrained=True).pretrained
    assert sys.path == before
    assert sys.modules["types"] is types


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tim:vit_tiny_patch16_224", "unknown library, got 'tim'; did you mean 'timm"),
        ("timm:vit_tiny_patch16_223", "did you mean 'vit_tiny_patch16_224"),
        ("torchvision:swin_tt", "did you mean 'swin_t"),
        ("transformers:VitForImageClassification", "did you mean 'ViTForImageClassification"),
        ("transformers:AutoModel", "not a concrete model class"),
        ("transformers:ViTConfig", "not a concrete model class"),
        ("vit_tiny_patch16_223", "did you mean 'vit_tiny_patch16_224"),
        ("", "unknown model, got ''"),
        ("nowhere/file.py:Model", r"no such file: nowhere.file\.py"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(spec, message):
    with pytest.raises(ArgumentError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own", "unknown factory in .*, got 'own'; did you mean 'Own"),
        ("instance", "not a class or function that returns a model"),
        ("WIDTH", "not a class or function that returns a model"),
        ("number", "returned int, not an nn.Module"),
    ],
)
def test_a_file_must_hold_a_factory(own_file, name, message):
    with pytest.raises(ArgumentError, match=message):
        load_model(f"{own_file}:{name}")


def test_unknown_transformers_options_are_refused():
    with pytest.raises(ArgumentError, match="did you mean 'num_hidden_layers"):
        load_model("transformers:ViTModel", num_hiden_layers=1)


def test_transformers_classes_have_no_weights():
    with pytest.raises(ArgumentError, match=r"use ViTModel\.from_pretrained"):
        load_model("transformers:ViTModel", pretrained=True)


@pytest.mark.parametrize("spec", ["timm:vit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_a_missing_library_says_how_to_install_it(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ArgumentError, match=r"pip install 'attnrewrite\[zoo\]'"):
        load_model(spec)


def test_a_bare_name_needs_only_one_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert type(load_model("swin_t")).__name__ == "SwinTransformer"
