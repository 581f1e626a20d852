"""The papers' operators as modules: projections and all, usable alone, for maps of any size."""

from .aggregated import AggregatedAttention
from .conv_ffn import ConvFFN
from .conv_glu import ConvGLU
from .cosine_attention import CosineAttention
from .cross_scale import CrossScaleMerge, CrossScaleStem
from .drop_path import DropPath
from .dynamic_position_bias import DynamicPositionBias
from .long_short_distance import LongShortDistanceAttention
from .manhattan import ManhattanAttention
from .neighborhood_block import NeighborhoodAttention2d
from .tokens_to_token import TokensToToken

__all__ = [
    "AggregatedAttention", "ConvFFN", "ConvGLU", "CosineAttention", "CrossScaleMerge", "CrossScaleStem", "DropPath",
    "DynamicPositionBias", "LongShortDistanceAttention", "ManhattanAttention", "NeighborhoodAttention2d",
    "TokensToToken",
]  # fmt: skip
