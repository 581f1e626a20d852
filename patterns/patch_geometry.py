"""How the patches lie that a linear map merges."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ..graph.values import shape_of


def map_width(source: Node) -> int | None:
    """The width of a channels-last map; None for tokens, whose map is not in their shape."""
    shape = shape_of(source)
    return shape[2] if len(shape) == 4 else None


def patch_geometry(
    patches: Tensor, size: tuple[int, int], width: int | None
) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """The map that patches are cut from, and the channel order of a patch's places; None if they are cut otherwise."""
    rows, columns = size
    patches = patches[0]  # all samples are cut alike
    first = patches.flatten(0, -2)[0].tolist()
    if width is None:  # the second row of a patch starts one map row after the first
        width = sorted(first)[columns]
    place = {token: (token // width) * columns + token % width for token in first}
    if width < columns or sorted(place.values()) != list(range(rows * columns)):
        return None
    height = int(patches.max()) // width + 1
    return (height, width), tuple(place[token] for token in first)
