"""Autocast inside a model's forward, on the meta device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

_EXCHANGING = threading.RLock()
"""Another thread must not take what stands there for a while for what is to be put back."""


@contextmanager
def off_on_meta() -> Iterator[None]:
    """torch raises when it is asked about autocast on the meta device, and modules ask; it is never on there."""
    with _EXCHANGING:
        asked, region = torch.is_autocast_enabled, torch.autocast

        def answer(device_type: str | None = None) -> bool:
            return False if device_type == "meta" else asked(*(() if device_type is None else (device_type,)))

        def enter(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return nullcontext() if device_type == "meta" else region(device_type, *args, **kwargs)

        torch.is_autocast_enabled, torch.autocast = answer, enter  # type: ignore[assignment, misc]  # torch says: these functions only
        try:
            yield
        finally:
            torch.is_autocast_enabled, torch.autocast = asked, region  # type: ignore[misc]  # torch says: a type
