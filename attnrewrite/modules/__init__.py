"""The attention cores that sites are rewritten to: modules of heads-last query, key and value, without parameters."""

from .dense import DenseAttention
from .neighborhood import NeighborhoodAttention, ReducedNeighborhoodAttention
from .window import WindowAttention

__all__ = ["DenseAttention", "NeighborhoodAttention", "ReducedNeighborhoodAttention", "WindowAttention"]
