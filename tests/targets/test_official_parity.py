"""``official=True``: stored weights of the official modules load strictly into converted sites, which then give the
stored results."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from random_weights import randomized
from safetensors.torch import load_file
from site_donors import new_cores
from torch import Tensor, nn

import attnrewrite

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-10


def stored(name: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def parameters(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    start = f"param/{prefix}"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def vit(dim: int, heads: int, side: int, **options: object) -> nn.Module:
    """Of ``side`` x ``side`` tokens of 4 x 4 pixels, without a class token."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=4 * side, patch_size=4, embed_dim=dim, num_heads=heads, depth=2, num_classes=5,
        class_token=False, global_pool="avg", **options,
    )  # fmt: skip
    return randomized(model).double()


def official(model: nn.Module, image_side: int, to: str, **options: object) -> nn.Module:
    image = torch.randn(1, 3, image_side, image_side, dtype=torch.float64)
    return attnrewrite.convert(model, to, image, fidelity="fresh", official=True, **options)


def deviation(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp(min=1))


ATTENTIONS = [
    ("transnext/aa_sr2_8x8_h2", (24, 2, 8), "aggregated", {"pool": 2}, ""),
    ("transnext/aa_sr2_k5_8x8_h2", (16, 2, 8), "aggregated", {"pool": 2, "window_size": 5}, ""),
    ("transnext/full_attn_7x7_h3", (24, 3, 7), "aggregated", {}, ""),
    ("rmt/masa_full_8x8_h4", (24, 4, 8), "manhattan", {}, ""),
    ("rmt/masa_decomposed_8x8_h4", (24, 4, 8), "manhattan_decomposed", {}, ""),
    ("crossformer/sda_8x8_G4", (48, 3, 8), "long_short_distance", {"group_size": 4}, "attn."),
    ("crossformer/lda_8x8_G4_I2", (48, 4, 8), "long_short_distance", {"group_size": 4}, "attn."),
    ("neighborhood/nat_layer_k5_8x8", (24, 3, 8), "neighborhood", {"kernel_size": 5}, "attn."),
    ("neighborhood/dinat_layer_k3_d3_9x9_ls", (16, 2, 9), "dilated_neighborhood", {"kernel_size": 3}, "attn."),
]


@pytest.mark.parametrize(("name", "shape", "to", "options", "prefix"), ATTENTIONS, ids=[case[0] for case in ATTENTIONS])
def test_attention(name, shape, to, options, prefix):
    """The second block: there distance is long, and dilation the largest."""
    tensors, model = stored(name), official(vit(*shape), 4 * shape[2], to, **options)
    first, second = new_cores(model, "attention")
    block, core = (0, first) if "sda" in name else (1, second)
    core.load_state_dict(parameters(tensors, prefix), strict=True)
    attend = model.blocks[block].attn
    if not prefix:
        found, expected = attend(tensors["input"].reshape(1, -1, shape[0])), tensors["output"]
    elif to == "long_short_distance":
        found, expected = attend(_normed(tensors["input"], tensors, "norm1")), tensors["extra/attn_branch"]
    else:
        found, expected = _nat_block(tensors, attend), tensors["output"]
    assert deviation(found, expected.reshape(found.shape)) <= (1e-6 if "extra/attn_branch" in tensors else TOLERANCE)


def _normed(source: Tensor, tensors: dict[str, Tensor], norm: str) -> Tensor:
    affine = parameters(tensors, f"{norm}.")
    return F.layer_norm(source, source.shape[-1:], affine["weight"], affine["bias"])


def _nat_block(tensors: dict[str, Tensor], attend: nn.Module) -> Tensor:
    """The stored layer around its attention."""
    source = tensors["input"].flatten(1, 2)
    ones = torch.ones((), dtype=torch.float64)
    gammas = [tensors.get(f"param/gamma{number}", ones) for number in (1, 2)]
    source = source + gammas[0] * attend(_normed(source, tensors, "norm1"))
    mlp = parameters(tensors, "mlp.")
    hidden = F.gelu(F.linear(_normed(source, tensors, "norm2"), mlp["fc1.weight"], mlp["fc1.bias"]))
    return source + gammas[1] * F.linear(hidden, mlp["fc2.weight"], mlp["fc2.bias"])


def test_gated_unit():
    tensors, model = stored("transnext/convglu_8x8"), official(vit(24, 3, 8, mlp_ratio=3), 32, "conv_glu")
    new_cores(model, "mlp")[0].load_state_dict(parameters(tensors), strict=True)
    assert deviation(model.blocks[0].mlp(tensors["input"]), tensors["output"]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["transformer", "performer"])
def test_tokens_to_token(kind):
    tensors = stored(f"t2t/t2t_module_{kind}_img32")
    donor = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=1, num_classes=5)
    model = official(randomized(donor).double(), 32, "tokens_to_token", kind=kind, token_dim=12)
    new_cores(model, "stem")[0].load_state_dict(parameters(tensors), strict=True)
    assert deviation(model.patch_embed(tensors["input"]), tensors["output"]) <= 1e-6  # in float32 where stored


def test_cross_scale_embeddings():
    donor = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=16,
        num_classes=5,
    )  # fmt: skip
    model = official(randomized(donor).double(), 32, "cross_scale")
    stem, merge = new_cores(model, "stem")
    image = stored("crossformer/cel_stem_32x32")
    stem.load_state_dict(parameters(image), strict=True)
    assert deviation(model.patch_embed(image["input"]).flatten(1, 2), image["output"]) <= TOLERANCE
    source = stored("crossformer/cel_merge_8x8")
    merge.load_state_dict(parameters(source), strict=True)
    found = model.layers[1].downsample(source["input"].unflatten(1, (8, 8)))
    assert deviation(found.flatten(1, 2), source["output"]) <= TOLERANCE
