"""A captured graph in the spelling that recognizers read; the modules of the model stay what they are."""

from __future__ import annotations

from ..capture import CapturedGraph
from .channel_maps import ChannelMaps, restate_convolutions
from .linear_modules import restate_linear_modules


def restate(capture: CapturedGraph) -> ChannelMaps:
    """Restate ``capture``'s graph in place. Returns which linear maps are convolutions in the model."""
    restate_linear_modules(capture)
    return restate_convolutions(capture)
