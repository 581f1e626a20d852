"""Token layers, T2T module, blocks and whole models of T2T-ViT."""

from __future__ import annotations

from golden import Golden, Subject, counterpart, require_understood

from attnrewrite.models.t2t_vit import T2TViT
from attnrewrite.modules.token_layers import TokenPerformer, TokenTransformer
from attnrewrite.modules.tokens_to_token import TokensToToken
from attnrewrite.modules.transformer_block import SelfAttention, TransformerBlock

NO_EFFECT = {
    "drop", "attn_drop", "proj_drop", "drop_path", "drop_rate", "attn_drop_rate", "drop_path_rate", "dp1", "dp2",
}  # fmt: skip
"""Rates of dropout, which files computed in eval mode do not show."""


def build(golden: Golden) -> Subject:
    options = {name: value for name, value in golden.constructor.items() if name not in NO_EFFECT}
    subject = counterpart(golden, BUILDERS)(options)
    require_understood(golden, options)
    return subject


def taken(options, names):
    """Our arguments for the official ones that are given, which are taken out of ``options``."""
    given = {ours: options.pop(official) for official, ours in names.items() if official in options}
    return {name: value for name, value in given.items() if value is not None}


def of_tokens(module):
    return Subject(module, lambda inputs: {"output": module(inputs["input"])})


def attention(options):
    given = taken(options, {"dim": "dim", "num_heads": "num_heads", "qkv_bias": "qkv_bias", "qk_scale": "scale"})
    return of_tokens(SelfAttention(**{"num_heads": 8, "qkv_bias": False, **given}))


def block(options):
    same = {name: name for name in ("dim", "num_heads", "mlp_ratio", "qkv_bias")}
    return of_tokens(TransformerBlock(**{"qkv_bias": False, **taken(options, {**same, "qk_scale": "scale"})}))


def token_transformer(options):
    if options.pop("num_heads", 1) != 1:
        raise LookupError("Token_transformer: the official layer runs with one head only")
    same = {name: name for name in ("dim", "mlp_ratio", "qkv_bias")}
    return of_tokens(TokenTransformer(**taken(options, {**same, "in_dim": "out_dim", "qk_scale": "scale"})))


def token_performer(options):
    heads = options.pop("head_cnt", 1)
    given = taken(options, {"dim": "dim", "in_dim": "out_dim", "kernel_ratio": "kernel_ratio"})
    given["out_dim"] *= heads  # the official heads only widen the one that there is
    return of_tokens(TokenPerformer(**given))


def stem_arguments(options):
    given = taken(options, {"in_chans": "in_chans", "tokens_type": "kind"})
    width = options.pop("token_dim", 64)
    return {**given, "token_dims": (width, width)}


def stem(options):
    options.pop("img_size", None)
    module = TokensToToken(**stem_arguments(options), **taken(options, {"embed_dim": "embed_dim"}))
    features = {}
    for level in (1, 2):
        layer = getattr(module, f"attention{level}")
        mix = layer.mix
        layer.mix = lambda projected, mix=mix, name=f"feature/attention{level}": features.setdefault(
            name, mix(projected)
        )
    return Subject(module, lambda inputs: {"output": module(inputs["input"]).flatten(1, 2), **features})


def model(options):
    same = {
        name: name
        for name in (
            "img_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale",
        )
    }  # fmt: skip
    defaults = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    module = T2TViT(**{**defaults, **taken(options, same), **stem_arguments(options)})
    features = {}

    def keep(name):
        return lambda part, inputs, output: features.update({name: output.flatten(1, -2)})

    module.tokens_to_token.register_forward_hook(keep("feature/tokens_to_token"))
    for index, part in enumerate(module.blocks):
        part.register_forward_hook(keep(f"feature/blocks.{index}"))
    return Subject(module, lambda inputs: {"output": module(inputs["input"]), **features})


BUILDERS = {
    "Attention": attention,
    "Block": block,
    "Token_transformer": token_transformer,
    "Token_performer": token_performer,
    "T2T_module": stem,
    "T2T_ViT": model,
}
