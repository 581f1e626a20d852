"""Regions of a forward that turn autocast off: where it is off already they change nothing, and are traced in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.autocast_mode import autocast

from .boundaries import trace_length

Interval = tuple[int, int]
"""Trace positions, half open."""


@contextmanager
def disabled_regions_in_place() -> Iterator[list[Interval]]:
    """An exporter would make a graph of its own of such a region; this one gives where they were instead."""
    found: list[Interval] = []
    entered: list[tuple[autocast, int]] = []
    enter, leave = autocast.__enter__, autocast.__exit__

    def enter_unless_idle(region: autocast) -> Any:
        if region._enabled or torch.is_autocast_enabled(region.device):
            return enter(region)
        entered.append((region, trace_length()))
        return region

    def leave_unless_idle(region: autocast, *exception: Any) -> Any:
        if not entered or entered[-1][0] is not region:
            return leave(region, *exception)
        found.append((entered.pop()[1], trace_length()))
        return False

    autocast.__enter__, autocast.__exit__ = enter_unless_idle, leave_unless_idle  # type: ignore[method-assign]  # exchanged for a while
    try:
        yield found
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]  # and back
