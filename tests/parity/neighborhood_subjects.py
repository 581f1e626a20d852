"""Neighborhood attention as a function of tensors, and the layers of NAT and DiNAT."""

from __future__ import annotations

from golden import Golden, Subject, counterpart, require_understood
from torch import nn

from attnrewrite.functional import neighborhood_attention
from attnrewrite.models.nat import NAT, DiNATS
from attnrewrite.models.nat_isotropic import IsotropicNAT
from attnrewrite.models.stage import Stage
from attnrewrite.modules.feed_forward import FeedForward
from attnrewrite.modules.neighborhood_block import (
    ConvDownsampler,
    ConvTokenizer,
    NeighborhoodAttention2d,
    NeighborhoodBlock,
    PatchEmbedding,
    PatchMerging,
)

OPERANDS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "rpb": "bias",
    "add_k": "additional_keys",
    "add_v": "additional_values",
}


def build(golden: Golden, backend: str | None = None) -> Subject:
    def function(inputs):
        operands = {OPERANDS[name]: tensor for name, tensor in inputs.items()}
        output, lse = neighborhood_attention(**operands, **golden.call, backend=backend, return_lse=True)
        return {"output": output, "extra/lse": lse}

    return Subject(nn.Module(), function) if golden.family == "na" else layer(golden)


def layer(golden: Golden) -> Subject:
    options = {name: value for name, value in golden.constructor.items() if name not in NO_EFFECT}
    module = counterpart(golden, BUILDERS)(options)
    require_understood(golden, options)
    features = observed(module)
    return Subject(module, lambda inputs: {"output": final(module(inputs["input"])), **features}, rename)


def taken(options, *same, **renamed):
    """Our arguments for the official ones that are given, which are taken out of ``options``."""
    names = {name: name for name in same} | renamed
    given = {ours: options.pop(official) for official, ours in names.items() if official in options}
    return {name: value for name, value in given.items() if value is not None}


def observed(module):
    """The results of a whole model's parts by official place, filled when it runs."""
    features = {}
    for name, part in module.named_modules():
        if isinstance(part, (NeighborhoodBlock, Stage)) or name in ("patch_embed", "norm"):
            part.register_forward_hook(
                lambda _part, _inputs, output, name=name: features.update({f"feature/{name}": final(output)})
            )
    return features


def final(output):
    """What the official part gives: of a level only the downsampled map."""
    return output[-1] if isinstance(output, tuple) else output


def rename(name):
    return None if name.endswith("relative_position_index") else name


def attention(options):
    if options.pop("is_causal", False):
        raise LookupError("NeighborhoodAttention2D: is_causal has no counterpart with projections")
    given = taken(options, *ATTENTION, "rel_pos_bias", qk_scale="scale", bias="rel_pos_bias")
    return NeighborhoodAttention2d(**{"rel_pos_bias": False, **given})


def block(options):
    return NeighborhoodBlock(**taken(options, *ATTENTION, "mlp_ratio", "layer_scale", qk_scale="scale"))


def global_attention(options):
    return NeighborhoodAttention2d(kernel_size=side(options), **taken(options, *ATTENTION, qk_scale="scale"))


def global_block(options):
    given = taken(options, *ATTENTION, "mlp_ratio", qk_scale="scale")
    return NeighborhoodBlock(kernel_size=side(options), **given)


def side(options):
    size = options.pop("input_size")
    return size if isinstance(size, int) else size[0]


def level(downsampler, downsampled):
    def build_level(options):
        downsample = options.pop("downsample", downsampled)
        depth, dilations = options.pop("depth"), options.pop("dilations", None)
        given = taken(options, *ATTENTION, "mlp_ratio", "layer_scale", qk_scale="scale")
        blocks = [NeighborhoodBlock(**given, dilation=one) for one in dilations or [1] * depth]
        return Stage(blocks, downsampler(given["dim"]) if downsample else None)

    return build_level


def tokenizer(options):
    given = {"in_chans": 3, "embed_dim": 96, **taken(options, "in_chans", "embed_dim")}
    module = ConvTokenizer(given["in_chans"], given["embed_dim"])
    if not normed(options):
        module.norm = nn.Identity()
    return module


def patch_embedding(options):
    given = {"in_chans": 3, "embed_dim": 96, "patch_size": 4, **taken(options, "in_chans", "embed_dim", "patch_size")}
    return PatchEmbedding(*(given[name] for name in ("in_chans", "embed_dim", "patch_size")), normed(options))


def normed(options):
    return bool(options.pop("with_norm", options.pop("norm_layer", None)))


def hierarchical(model, **defaults):
    def build_model(options):
        for name, value in FIXED.items():
            if options.pop(name, value) != value:
                raise LookupError(f"{model.__name__}: {name} has no counterpart but {value}")
        return model(**{**defaults, **taken(options, *SHAPE, "depths", "dilations", "layer_scale")})

    return build_model


def isotropic(options):
    image, given = options.pop("img_size", 224), taken(options, *SHAPE, "depth", "dilation", "patch_size", "patch_norm")
    if "VisionTransformerLayer" in str(options.pop("layer", "")):
        given |= {"kernel_size": image // given.get("patch_size", 16), "dilation": 1}
    return IsotropicNAT(**given)


NO_EFFECT = {
    "drop", "attn_drop", "proj_drop", "drop_path", "drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip
"""Rates of dropout, which files computed in eval mode do not show."""
FIXED = {"patch_size": 4, "patch_norm": True}
ATTENTION = ("dim", "num_heads", "kernel_size", "dilation", "qkv_bias")
SHAPE = ("in_chans", "num_classes", "embed_dim", "num_heads", "kernel_size", "mlp_ratio", "qkv_bias", "qk_scale")
BUILDERS = {
    "NeighborhoodAttention2D": attention,
    "NeighborhoodAttention": attention,
    "NATLayer": block,
    "NATransformerLayer": block,
    "MHSARPB": global_attention,
    "VisionTransformerLayer": global_block,
    "NATBlock": level(ConvDownsampler, True),
    "BasicLayer": level(PatchMerging, False),
    "ConvTokenizer": tokenizer,
    "PatchEmbed": patch_embedding,
    "ConvDownsampler": lambda options: ConvDownsampler(options.pop("dim")),
    "PatchMerging": lambda options: PatchMerging(options.pop("dim")),
    "Mlp": lambda options: FeedForward(options.pop("in_features"), options.pop("hidden_features")),
    "NAT": hierarchical(NAT),
    "DiNAT": hierarchical(NAT),
    "DiNAT_s": hierarchical(DiNATS, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0),
    "NATIsotropic": isotropic,
}
