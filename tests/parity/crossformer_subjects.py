"""CrossFormer and CrossFormer++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from golden import Golden, Subject, counterpart, require_understood

from attnrewrite.models.crossformer import OLD_BUFFERS, CrossFormer, CrossFormerBlock, group_schedule
from attnrewrite.modules.cross_scale import CrossScaleMerge, CrossScaleStem
from attnrewrite.modules.dynamic_position_bias import DynamicPositionBias
from attnrewrite.modules.long_short_distance import LongShortDistanceAttention
from attnrewrite.operators.partition_rule import AxisPartition, map_slots

INERT = {
    "attn_drop", "attn_drop_rate", "drop", "drop_path", "drop_path_rate", "drop_rate", "impl_type", "norm_layer",
    "num_input_patch_size", "num_patch_size", "use_checkpoint",
}  # fmt: skip
"""Official arguments without effect in evaluation."""
MODEL_OPTIONS = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratios",
    "patch_size": "patch_kernels",
    "merge_size": "merge_kernels",
    "patch_norm": "patch_norm",
    "use_acl": "cooling",
}
LAYERS = [f"pos{index}.{part}" for index in (1, 2, 3) for part in (0, 2)] + ["pos_proj"]
ILL_CONDITIONED = {f"{layer}.{kind}": 1e-2 for layer in LAYERS for kind in ("weight", "bias")}
"""Layer norms over a few channels: the official code itself deviates by 4e-4 in float32."""
MASKED = -1e6


def build(golden: Golden) -> Subject:
    options = {key: value for key, value in golden.constructor.items() if key not in INERT}
    builders = {
        "CrossFormer": _model,
        "CrossFormerBlock": _block,
        "DynamicPosBias": _position_bias,
        "PatchEmbed": _stem,
        "PatchMerging": _merge,
    }
    subject = counterpart(golden, builders)(golden, options)
    require_understood(golden, {key: value for key, value in options.items() if value not in (False, 0, None)})
    return subject


def _attention_options(options):
    """The arguments of official blocks and models that go to attention."""
    return {
        "padding": "keys" if options.pop("no_mask", False) else "mask",
        "centered": options.pop("pad_type", 0) != 0,
        "qkv_bias": options.pop("qkv_bias", True),
        "scale": options.pop("qk_scale", None) or None,
    }


def _rename(name):
    return None if name.endswith(OLD_BUFFERS) else name


def _model(golden, options):
    image = options.pop("img_size", 224)
    image = image if isinstance(image, int) else image[0]
    sizes, kind = options.pop("group_size", [7, 7, 7, 7]), options.pop("group_type", "constant")
    ours = {"patch_kernels": [4], "merge_kernels": [[2], [2], [2]], "mlp_ratios": [4, 4, 4, 4]}
    ours |= {own: options.pop(official) for official, own in MODEL_OPTIONS.items() if official in options}
    intervals, adaptive = options.pop("crs_interval", [8, 4, 2, 1]), options.pop("adaptive_interval", False)
    depths, side = ours.setdefault("depths", [2, 2, 6, 2]), image // ours["patch_kernels"][0]
    if kind != "constant":
        sizes = group_schedule(kind, depths, side, sizes)
    module = CrossFormer(
        **ours, group_sizes=sizes, intervals="adaptive" if adaptive else intervals, **_attention_options(options)
    )

    def run(inputs):
        features = {}

        def keep(name):
            return lambda *call: features.__setitem__(name, call[-1].flatten(1, 2))

        hooks = [module.patch_embed.register_forward_hook(keep("feature/patch_embed"))]
        hooks += [
            stage.blocks[-1].register_forward_hook(keep(f"feature/layers.{level}.last_block"))
            for level, stage in enumerate(module.layers)
        ]
        logits = module(inputs["input"])
        for hook in hooks:
            hook.remove()
        return {"output": logits, **features}

    return Subject(module, run, _rename, ILL_CONDITIONED)


def _block(golden, options):
    dim, grid = options.pop("dim"), tuple(options.pop("input_resolution"))
    interval = "adaptive" if options.pop("adaptive_interval", False) else options.pop("interval", 8)
    options.pop("interval", None)
    attention = LongShortDistanceAttention(
        dim,
        options.pop("num_heads"),
        options.pop("group_size", 7),
        interval if options.pop("lsda_flag", 0) else None,
        **_attention_options(options),
    )
    hidden = int(dim * options.pop("mlp_ratio", 4.0))
    module = CrossFormerBlock(dim, attention, hidden, options.pop("use_extra_conv", True))

    def run(inputs):
        branch = []
        hook = attention.register_forward_hook(lambda *call: branch.append(call[-1]))
        output = module(inputs["input"].unflatten(1, grid)).flatten(1, 2)
        hook.remove()
        hidden_keys = _hidden_keys(attention, grid)
        shape = golden.tensors["extra/attn_branch"].shape if "extra/attn_branch" in golden.tensors else output.shape
        return {
            "output": output,
            "extra/attn_branch": branch[0].reshape(shape),
            "extra/attn_mask_key": hidden_keys.to(output.dtype) * MASKED,
        }

    return Subject(module, run, _rename, ILL_CONDITIONED)


def _hidden_keys(attention, grid):
    """``[groups, slots]``: which slots of the padded map hold no token."""
    group, interval = attention.groups(*grid)
    (top, left), (bottom, right) = attention.padding_of(grid, group, interval)
    inside = F.pad(torch.ones(grid, dtype=torch.bool), (left, right, top, bottom))
    axes = [AxisPartition(*each[:2], interval=each[2]) for each in zip(inside.shape, group, interval, strict=True)]
    counts = [count for axis in axes for count in (axis.length // axis.region, axis.interval)]
    slots = map_slots(*axes).unflatten(0, counts).transpose(1, 2).flatten(0, 3)  # by regions, then inside each
    return ~inside.flatten()[slots]


def _position_bias(golden, options):
    module = DynamicPositionBias(options.pop("dim") // 4, options.pop("num_heads"))
    return Subject(module, lambda inputs: {"output": module(inputs["input"])}, _rename, ILL_CONDITIONED)


def _stem(golden, options):
    options.pop("img_size", None)
    kernels, channels = options.pop("patch_size", [4]), options.pop("in_chans", 3)
    module = CrossScaleStem(channels, options.pop("embed_dim", 96), kernels, norm=options.pop("with_norm", False))
    return Subject(module, lambda inputs: {"output": module(inputs["input"]).flatten(1, 2)})


def _merge(golden, options):
    grid, dim = options.pop("input_resolution"), options.pop("dim")
    module = CrossScaleMerge(dim, options.pop("patch_size", [2]))
    return Subject(module, lambda inputs: {"output": module(inputs["input"].unflatten(1, grid)).flatten(1, 2)})
