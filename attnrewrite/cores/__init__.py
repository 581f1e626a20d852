"""The cores that sites are rewritten to, on heads-last queries, keys and values; projections stay the site's own."""

from ..modules.activation import Activation
from .aggregated import AggregatedCore, LocalBranch, MaskedAggregatedCore, ReducedAggregatedCore
from .dense import DenseAttention
from .grouped import GroupedCore
from .interleaved import InterleavedAttention
from .manhattan import DecomposedManhattanCore, ManhattanCore, ReducedManhattanCore
from .neighborhood import NeighborhoodAttention, ReducedNeighborhoodAttention, SlidingAttention
from .pixel_keys import PixelKeys
from .sequence import InTokenOrder, OfMap
from .stem import GatherPatches, MapToTokens
from .window import WindowAttention

__all__ = [
    "Activation", "AggregatedCore", "DecomposedManhattanCore", "DenseAttention", "GatherPatches", "GroupedCore",
    "InTokenOrder", "InterleavedAttention", "LocalBranch", "ManhattanCore", "MapToTokens", "MaskedAggregatedCore",
    "NeighborhoodAttention", "OfMap", "PixelKeys", "ReducedAggregatedCore", "ReducedManhattanCore",
    "ReducedNeighborhoodAttention", "SlidingAttention", "WindowAttention",
]  # fmt: skip
