"""RMT (Fan et al., "RMT: Retentive Networks Meet Vision Transformers", CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, nearest
from ..modules.drop_path import drop_path_rates
from ..modules.initialization import initialize_linear
from ..modules.manhattan import ManhattanAttention
from ..modules.rmt_block import ConvDownsample, ConvStem, ManhattanBlock, StagePosition
from .registry import Family, State, register_family
from .stage import stage_maps
from .vision_model import VisionModel

TOKEN_LABEL = ("map", "projected")
TOKEN_SHARE = 0.5
"""Weight of the strongest token in the logits of a model with token labels."""


class Generation(NamedTuple):
    """What one public code has: kind of rotary position, FFN convolution, a projection before the classifier."""

    rotary: str
    ffn_conv: bool
    projects: bool


GENERATIONS = {"2024": Generation("raster", True, True), "2023": Generation("none", False, False)}
"""The code of June 2024, with which the published weights were trained, and the first public one, of December 2023."""


class Stage(nn.Module):
    """Blocks of one width, which share their position tables."""

    def __init__(self, position: StagePosition, blocks: Sequence[ManhattanBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.Relpos = position
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, W, C]`` to what the last block gives, and to that downsampled, if there is a next stage."""
        tables = self.Relpos(source.shape[1], source.shape[2], source)
        for block in self.blocks:
            source = block(source, tables)
        return source, source if self.downsample is None else self.downsample(source)


class RMT(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits.

    ``forward_features`` gives the last map ``[B, H / 32, W / 32, C]``, before projection and batch norm.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: one value per stage.
        initial_decays, decay_ranges: per stage, as in ``ManhattanPosition``; not trained, and not told by the weights'
            shapes, so that weights with other decays are refused.
        decomposed: per stage, whether attention goes along rows and columns instead of over the whole map.
        layer_scales: per stage, whether residual branches have trained factors, initially ``layer_scale_init``.
        projection: width of the projection before the classifier, in generation 2024.
        generation: ``"2024"`` or ``"2023"``, the two public codes, whose weights do not fit each other;
            ``load_official`` finds out which.
        rotary, ffn_conv: None is as in the generation; as in ``ManhattanPosition`` and ``ConvFFN``.
        decay_placement, lce: as in ``ManhattanAttention``.
        token_label: a second classifier for tokens (Jiang et al. 2021); half of each class's strongest token is added
            to the logits. ``"map"`` reads the last map, as the released code does, ``"projected"`` the projected one:
            only so wide is the classifier in the released log of size S.
        dense: the backbone for detection and segmentation: no projection, batch norm and classifier, but a layer norm
            (``extra_norms``) on every feature map.
    """

    def __init__(
        self,
        *,
        generation: str = "2024",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        initial_decays: Sequence[float] = (2, 2, 2, 2),
        decay_ranges: Sequence[float] = (4, 4, 6, 6),
        decomposed: Sequence[bool] = (True, True, False, False),
        layer_scales: Sequence[bool] = (False, False, False, False),
        layer_scale_init: float = 1e-6,
        drop_path_rate: float = 0.1,
        projection: int = 1024,
        rotary: str | None = None,
        ffn_conv: bool | None = None,
        decay_placement: str = "inside",
        lce: bool = True,
        token_label: str | None = None,
        dense: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        per_stage = [
            embed_dims, depths, num_heads, mlp_ratios, initial_decays, decay_ranges, decomposed, layer_scales,
        ]  # fmt: skip
        _check(generation, token_label, dense, num_classes, per_stage)
        code = GENERATIONS[generation]
        self.patch_embed = ConvStem(in_chans, embed_dims[0])
        self.layers = nn.ModuleList()
        for index, rates in enumerate(drop_path_rates(drop_path_rate, tuple(depths))):
            dim, heads = embed_dims[index], num_heads[index]
            place = (initial_decays[index], decay_ranges[index], code.rotary if rotary is None else rotary)
            blocks = [
                ManhattanBlock(
                    dim,
                    ManhattanAttention(dim, heads, decomposed[index], *place, decay_placement, lce),
                    int(dim * mlp_ratios[index]),
                    code.ffn_conv if ffn_conv is None else ffn_conv,
                    layer_scale_init if layer_scales[index] else None,
                    rate,
                )
                for rate in rates
            ]
            following = embed_dims[index + 1 : index + 2]
            down = ConvDownsample(dim, following[0]) if following else None
            self.layers.append(Stage(StagePosition(dim // heads, heads, *place), blocks, down))
        self._add_head(embed_dims, projection if code.projects and not dense else None, dense)
        self.token_label = token_label
        self.reset_classifier(num_classes, global_pool)
        self.apply(initialize_linear)
        self.register_load_state_dict_pre_hook(_refuse_other_decays)

    def _add_head(self, embed_dims: Sequence[int], projection: int | None, dense: bool) -> None:
        """What stands between the stages' maps and whoever reads them, except for the classifiers."""
        self.num_features = embed_dims[-1]
        self.head_hidden_size = self.num_features if projection is None else projection
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << level, "module": f"layers.{level}"}
            for level, dim in enumerate(embed_dims)
        ]
        self.extra_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in embed_dims) if dense else None
        self.proj = None if projection is None else nn.Linear(self.num_features, projection)
        self.norm = None if dense else nn.BatchNorm2d(self.head_hidden_size)
        self.aux_head: nn.Module | None = None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.token_label and num_classes:
            width = self.num_features if self.token_label == "map" else self.head_hidden_size
            reference = next(self.parameters())
            self.aux_head = nn.Linear(width, num_classes, device=reference.device, dtype=reference.dtype)
            initialize_linear(self.aux_head)
        else:
            self.aux_head = None

    def forward_features(self, image: Tensor) -> Tensor:
        """``[B, H / 32, W / 32, C]``, sides rounded up at each halving."""
        return stage_maps(self.layers, self.patch_embed(image))[-1]

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        maps = stage_maps(self.layers, self.patch_embed(image))
        if self.extra_norms is not None:
            maps = [norm(source) for norm, source in zip(self.extra_norms, maps, strict=True)]
        return [source.permute(0, 3, 1, 2) for source in maps]

    def pool(self, features: Tensor) -> Tensor:
        return self._projected(features).mean((1, 2))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features; with ``pre_logits`` what the classifier would read."""
        if self.aux_head is None or pre_logits:
            return super().forward_head(features, pre_logits)
        projected = self._projected(features)
        tokens = self.aux_head(features if self.token_label == "map" else projected)
        return self.head(projected.mean((1, 2))) + TOKEN_SHARE * tokens.amax((1, 2))

    def _projected(self, features: Tensor) -> Tensor:
        """``[B, H, W, head_hidden_size]``: the last map as the classifier sees it."""
        if self.norm is None:
            return features
        source = features if self.proj is None else self.proj(features)
        source = self.norm(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return source if self.proj is None else F.silu(source)


def _check(
    generation: str, token_label: str | None, dense: bool, num_classes: int, per_stage: list[Sequence[Any]]
) -> None:
    if generation not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise ArgumentError(
            f"generation: must be one of {known}, got {generation!r}{nearest(str(generation), GENERATIONS)}"
        )
    if token_label not in (None, *TOKEN_LABEL):
        raise ArgumentError(f"token_label: must be None or one of {', '.join(TOKEN_LABEL)}, got {token_label!r}")
    if token_label == "projected" and not GENERATIONS[generation].projects:
        raise ArgumentError(f"token_label: generation {generation} has no projected map; use 'map'")
    if dense and num_classes:
        raise ArgumentError("num_classes: a dense backbone has no classifier; pass num_classes=0")
    if len({len(values) for values in per_stage}) != 1:
        raise ArgumentError(
            f"depths: all per-stage options must have the same length, got {[len(values) for values in per_stage]}"
        )


def _refuse_other_decays(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before anything is loaded: the weights only make sense with the decays they were trained with."""
    assert isinstance(model, RMT)
    for index, stage in enumerate(model.layers):
        name = f"{prefix}layers.{index}.Relpos.decay"
        position = stage.Relpos
        assert isinstance(position, StagePosition)
        if name in state and not position.agrees(state[name]):
            raise CheckpointError(
                f"{name}: the weights were trained with decays that differ from this model's; "
                "build it with their initial_decays and decay_ranges"
            )


def owns(state: State) -> bool:
    """Whether weights are of this family, by their names."""
    return any(".retention.q_proj." in name for name in state)


def prepare(state: State) -> tuple[State, dict[str, Any]]:
    """The weights as they are, and the code generation, token labels and dense form that they tell.

    Raises:
        CheckpointError: if they mix the generations.
    """
    convolves = any(".ffn.dwconv." in name for name in state)
    if "norm.weight" not in state:
        return state, {"generation": "2024" if convolves else "2023", "dense": True}
    if convolves != ("proj.weight" in state):
        raise CheckpointError(
            "the checkpoint mixes code generations: that of 2024 has both ffn.dwconv and proj, that of 2023 neither"
        )
    told: dict[str, Any] = {"generation": "2024" if convolves else "2023"}
    if "aux_head.weight" in state:
        projected = convolves and state["aux_head.weight"].shape[1] == state["proj.weight"].shape[0]
        told["token_label"] = "projected" if projected else "map"
    return state, told


_BASE: dict[str, Any] = {
    "embed_dims": (80, 160, 320, 512),
    "depths": (4, 8, 25, 8),
    "num_heads": (5, 5, 10, 16),
    "decay_ranges": (5, 5, 6, 6),
    "mlp_ratios": (4, 4, 3, 3),
    "decomposed": (True, True, True, False),
    "layer_scales": (False, False, True, True),
    "drop_path_rate": 0.4,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "rmt_tiny": {},
    "rmt_small": {
        "depths": (3, 4, 18, 4),
        "mlp_ratios": (4, 4, 3, 3),
        "decomposed": (True, True, True, False),
        "drop_path_rate": 0.15,
    },
    "rmt_base": _BASE,
    "rmt_large": {
        **_BASE,
        "embed_dims": (112, 224, 448, 640),
        "num_heads": (7, 7, 14, 20),
        "decay_ranges": (6, 6, 6, 6),
        "drop_path_rate": 0.5,
    },
}

register_family(Family(model=RMT, variants=VARIANTS, owns=owns, prepare=prepare))
