"""Autocast inside a model's forward, where costs are read: on the meta device, and in an exported graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def off_on_meta() -> Iterator[None]:
    """torch raises when it is asked about autocast on the meta device, and modules ask; it is never on there."""
    asked, region = torch.is_autocast_enabled, torch.autocast

    def answer(device_type: str | None = None) -> bool:
        return False if device_type == "meta" else asked(*(() if device_type is None else (device_type,)))

    def enter(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else region(device_type, *args, **kwargs)

    torch.is_autocast_enabled, torch.autocast = answer, enter  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.autocast = asked, region  # type: ignore[misc]


@contextmanager
def disabled_ones_left_out() -> Iterator[None]:
    """A region that turns autocast off where it is off already changes nothing, but would be a graph of its own."""
    region = torch.autocast

    def enter(device_type: str, dtype: Any = None, enabled: bool = True, *rest: Any, **kwargs: Any) -> Any:
        if enabled or torch.is_autocast_enabled(device_type):
            return region(device_type, dtype, enabled, *rest, **kwargs)
        return nullcontext()

    torch.autocast = enter  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = region  # type: ignore[misc]
