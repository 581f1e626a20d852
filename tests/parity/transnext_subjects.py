"""TransNeXt: its attentions, gated unit, patch embedding, block and whole model."""

from __future__ import annotations

import torch
from golden import Golden, Subject, counterpart, require_understood
from torch import nn

from attnrewrite.models.transnext import OverlapPatchEmbed, TransNeXt, TransNeXtBlock
from attnrewrite.modules.aggregated import AggregatedAttention
from attnrewrite.modules.conv_glu import ConvGLU, gated_width
from attnrewrite.modules.cosine_attention import CosineAttention

INERT = {
    "attn_drop", "attn_drop_rate", "drop", "drop_path", "drop_path_rate", "drop_rate", "img_size",
    "input_resolution", "pretrained", "proj_drop",
}  # fmt: skip
"""Official arguments without effect in evaluation, or that ours takes from the input."""
PER_STAGE = ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios", "window_size")
OFFICIAL_DEFAULTS = {
    "embed_dims": [64, 128, 256, 512],
    "num_heads": [1, 2, 4, 8],
    "mlp_ratios": [8, 8, 4, 4],
    "depths": [3, 4, 6, 3],
    "sr_ratios": [8, 4, 2, 1],
    "window_size": [3, 3, 3, None],
    "qkv_bias": False,
    "norm_eps": 1e-5,
}


def build(golden: Golden) -> Subject:
    builders = {
        "AggregatedAttention": _attention,
        "Attention": _attention,
        "Block": _block,
        "ConvolutionalGLU": _gated_unit,
        "OverlapPatchEmbed": _embedding,
        "TransNeXt": _model,
    }
    builder = counterpart(golden, builders)
    options = {key: value for key, value in golden.constructor.items() if key not in INERT}
    if options.pop("act_layer", "GELU") not in ("GELU", "gelu", None):
        raise LookupError(f"no counterpart for act_layer={golden.constructor['act_layer']!r}")
    subject = builder(golden, options)
    require_understood(golden, options)
    return subject


def _attention(golden: Golden, options: dict) -> Subject:
    whole = golden.official_class == "Attention"
    return _on_map(golden, _attention_module(golden, options, whole, qkv_bias=True))


def _attention_module(golden: Golden, options: dict, whole: bool, qkv_bias: bool) -> nn.Module:
    options.pop("is_extrapolation", None)
    common = {
        "dim": options.pop("dim"),
        "num_heads": options.pop("num_heads", 8),
        "qkv_bias": options.pop("qkv_bias", qkv_bias),
        "pretrain_size": tuple(golden.call["pretrain_size"]),
        "interpolate_bias": _interpolates(golden),
    }
    if common["interpolate_bias"] and golden.call["query_size"] != golden.call["pretrain_size"]:
        raise LookupError("no counterpart for a bias that is resampled from another size than the pretraining's")
    ratio, size = options.pop("sr_ratio", 1), options.pop("fixed_pool_size", None)
    window = options.pop("window_size", 3)
    if whole:
        return CosineAttention(**common)
    pooling = {"sr_ratio": ratio} if size is None else {"pool_size": size}
    return AggregatedAttention(window_size=window, **pooling, **common)


def _block(golden: Golden, options: dict) -> Subject:
    hidden = gated_width(int(options["dim"] * options.pop("mlp_ratio", 4.0)))
    eps, dim = options.pop("norm_eps", 1e-5), options["dim"]
    attention = _attention_module(golden, options, whole=options.get("sr_ratio", 1) == 1, qkv_bias=False)
    return _on_map(golden, TransNeXtBlock(attention, dim, hidden, norm_eps=eps))


def _gated_unit(golden: Golden, options: dict) -> Subject:
    dim = options.pop("in_features")
    hidden = gated_width(options.pop("hidden_features", None) or dim)
    return _on_map(golden, ConvGLU(dim, hidden, options.pop("out_features", None)))


def _on_map(golden: Golden, module: nn.Module) -> Subject:
    sides = (golden.call["H"], golden.call["W"])
    return Subject(module, lambda inputs: {"output": module(inputs["input"].unflatten(1, sides)).flatten(1, 2)})


def _embedding(golden: Golden, options: dict) -> Subject:
    module = OverlapPatchEmbed(
        options.pop("patch_size", 7),
        options.pop("stride", 4),
        options.pop("in_chans", 3),
        options.pop("embed_dim", 768),
    )

    def run(inputs):
        embedded = module(inputs["input"])
        return {"output": embedded.flatten(1, 2), "extra/grid": torch.tensor(embedded.shape[1:3])}

    return Subject(module, run)


def _model(golden: Golden, options: dict) -> Subject:
    dense = _is_dense(golden)
    options.pop("is_extrapolation", None)
    stages = options.pop("num_stages", 4)
    ours = {
        "pretrain_size": options.pop("pretrain_size", None) or golden.constructor.get("img_size", 224),
        "num_classes": 0 if dense else 1000,
        "interpolate_bias": _interpolates(golden),
    }
    for key, value in OFFICIAL_DEFAULTS.items():
        given = options.pop(key, value)
        ours[key] = given[:stages] if key in PER_STAGE else given
    for key in ("num_classes", "in_chans", "patch_size", "fixed_pool_size"):
        if key in options:
            ours[key] = options.pop(key)
    if dense:
        ours["num_classes"] = 0
    module = TransNeXt(**ours)

    def run(inputs):
        if dense:
            return {f"output/{level}": part for level, part in enumerate(module.feature_maps(inputs["input"]))}
        maps = {}
        hooks = [
            module.get_submodule(f"norm{stage}").register_forward_hook(
                lambda _, __, result, place=f"feature/norm{stage}": maps.update({place: result.flatten(1, 2)})
            )
            for stage in range(1, stages + 1)
        ]
        output = module(inputs["input"])
        for hook in hooks:
            hook.remove()
        return {"output": output, **maps}

    return Subject(module, run)


def _is_dense(golden: Golden) -> bool:
    """Whether it is the code for detection and segmentation, without a head and for any size."""
    return not golden.metadata["source_file"].startswith("classification")


def _interpolates(golden: Golden) -> bool:
    return _is_dense(golden) and not golden.constructor.get("is_extrapolation", False)
