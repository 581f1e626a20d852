"""Random values in the place of captured ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from ..graph.values import Values, shape_of


def gaussian(nodes: Iterable[Node], dtype: torch.dtype) -> Values:
    """Independent standard normal values of every node's shape, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return {node: torch.randn(shape_of(node), generator=generator).to(node.meta["val"].device, dtype) for node in nodes}
