"""Modes that stand around a call and are no business of what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CASTING = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_modes() -> Iterator[None]:
    """Neither inference mode nor autocast, whatever the caller has: what is made here is trained and cast elsewhere."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for device in _CASTING:
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield
