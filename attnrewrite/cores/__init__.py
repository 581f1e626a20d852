"""The cores that sites are rewritten to: modules without parameters, on heads-last queries, keys and values."""

from .dense import DenseAttention
from .mlp import Activation
from .neighborhood import NeighborhoodAttention, ReducedNeighborhoodAttention
from .stem import GatherPatches, MapToTokens
from .window import WindowAttention

__all__ = [
    "Activation", "DenseAttention", "GatherPatches", "MapToTokens", "NeighborhoodAttention",
    "ReducedNeighborhoodAttention", "WindowAttention",
]  # fmt: skip
