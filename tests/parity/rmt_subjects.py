"""RMT in both of its public code generations."""

from __future__ import annotations

from golden import Golden, Subject

from attnrewrite.models.rmt import GENERATIONS, RMT, prepare
from attnrewrite.modules.conv_ffn import ConvFFN
from attnrewrite.modules.manhattan import ManhattanAttention
from attnrewrite.modules.rmt_block import ConvDownsample, ConvStem, ManhattanBlock, StagePosition
from attnrewrite.operators.manhattan_attention import map_bias

INERT = {
    "activation_dropout",
    "drop_path",
    "dropout",
    "layer_init_values",
    "norm_layer",
    "patch_norm",
    "use_checkpoints",
}
"""Official arguments without effect in evaluation, or on weights that are loaded."""
ATTENTION = {"VisionRetentionAll", "VisionRetentionChunk", "MaSA", "MaSAd"}
POSITION = {"RetNetRelPos2d", "RelPos2d"}
MODEL_OPTIONS = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dims": "embed_dims",
    "depths": "depths",
    "num_heads": "num_heads",
    "init_values": "initial_decays",
    "heads_ranges": "decay_ranges",
    "mlp_ratios": "mlp_ratios",
    "drop_path_rate": "drop_path_rate",
    "chunkwise_recurrents": "decomposed",
    "layerscales": "layer_scales",
    "projection": "projection",
}


def build(golden: Golden) -> Subject:
    name = golden.official_class
    options = {key: value for key, value in golden.constructor.items() if key not in INERT}
    generation = GENERATIONS["2023" if golden.call["gen"] == "dec2023" else "2024"]
    if name in ATTENTION:
        return _attention(golden, generation, options)
    if name == "RetBlock":
        return _block(golden, generation, options)
    if name in POSITION:
        return _position(golden, options)
    if name == "VisRetNet":
        return _model(golden, options)
    if name == "FeedForwardNetwork":
        conv = options.pop("subconv", generation.ffn_conv)
        module = ConvFFN(options.pop("embed_dim"), options.pop("ffn_dim"), conv)
    elif name == "PatchMerging":
        module = ConvDownsample(options.pop("dim"), options.pop("out_dim"))
    elif name == "PatchEmbed":
        module = ConvStem(options.pop("in_chans"), options.pop("embed_dim"))
    else:
        raise LookupError(f"no counterpart for {name}")
    _refuse(options)
    return Subject(module, lambda inputs: {"output": module(inputs["input"])})


def _refuse(options):
    """What is left over was not understood; a value that switches something off needs no counterpart."""
    left = [key for key, value in options.items() if value not in (False, 0, None)]
    if left:
        raise LookupError(f"no counterpart for {', '.join(left)}")


def _position_arguments(golden, generation):
    relpos = golden.call["relpos"]
    return relpos["initial_value"], relpos["heads_range"], generation.rotary


def _stage_tables(golden, arguments, heads, dim):
    """What the blocks of a stage share; compared with the official buffers too."""
    position = StagePosition(dim // heads, heads, *arguments)

    def compute(source):
        tables = position(*source.shape[1:3], source)
        return tables, {"extra/Relpos.decay": tables.log_decay}

    return compute


def _attention(golden, generation, options):
    dim, heads = options.pop("embed_dim"), options.pop("num_heads")
    if options.pop("value_factor", 1) != 1:
        raise LookupError("no counterpart for value_factor")
    _refuse(options)
    arguments = _position_arguments(golden, generation)
    module = ManhattanAttention(dim, heads, golden.call.get("chunk", False), *arguments)
    tables = _stage_tables(golden, arguments, heads, dim)
    return Subject(module, lambda inputs: {"output": module(inputs["input"]), **tables(inputs["input"])[1]})


def _block(golden, generation, options):
    dim, heads = options.pop("embed_dim"), options.pop("num_heads")
    decomposed = {"chunk": True, "whole": False}[options.pop("retention")]
    layer_scale = 1.0 if options.pop("layerscale", False) else None
    arguments = _position_arguments(golden, generation)
    attention = ManhattanAttention(dim, heads, decomposed, *arguments)
    module = ManhattanBlock(dim, attention, options.pop("ffn_dim"), generation.ffn_conv, layer_scale)
    _refuse(options)
    stage_tables = _stage_tables(golden, arguments, heads, dim)

    def run(inputs):
        tables, extra = stage_tables(inputs["input"])
        return {"output": module(inputs["input"], tables), **extra}

    return Subject(module, run)


def _position(golden, options):
    dim, heads = options.pop("embed_dim"), options.pop("num_heads")
    module = StagePosition(dim // heads, heads, options.pop("initial_value"), options.pop("heads_range"), "raster")
    _refuse(options)
    height, width = golden.call["H"], golden.call["W"]

    def run(inputs):
        tables = module(height, width, module.decay)
        return {
            "output/sin": tables.sin.repeat_interleave(2, -1),
            "output/cos": tables.cos.repeat_interleave(2, -1),
            "output/mask": map_bias(tables.log_decay, height, width),
            "output/mask_h": map_bias(tables.log_decay, height, 1),
            "output/mask_w": map_bias(tables.log_decay, 1, width),
        }

    return Subject(module, run)


def _model(golden, options):
    levels = options.pop("out_indices", (0, 1, 2, 3))
    ours = {MODEL_OPTIONS[key]: options.pop(key) for key in list(options) if key in MODEL_OPTIONS}
    _refuse(options)
    told = prepare(golden.under("param/"))[1]
    if told.get("dense"):
        ours["num_classes"] = 0
    module = RMT(**{"layer_scale_init": 1.0, **ours, **told})

    def run(inputs):
        image = inputs["input"]
        if told.get("dense"):
            maps = module.feature_maps(image)
            return {f"output/{place}": maps[level] for place, level in enumerate(levels)}
        results = {"output": module(image), "feature/patch_embed": module.patch_embed(image)}
        maps = {f"feature/layers.{level}.last_block": part for level, part in enumerate(module.feature_maps(image))}
        return results | {name: part.permute(0, 2, 3, 1) for name, part in maps.items()}

    return Subject(module, run)
