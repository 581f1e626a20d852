"""Random numbers that leave the caller's as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Whatever is random inside comes out the same every time; the random state is as before on exit."""
    with torch.random.fork_rng(devices=_random_devices(model)):
        torch.manual_seed(0)
        yield


class Stream:
    """Random numbers that go on, part by part, from where the caller's stand; the caller's stay there."""

    def __init__(self) -> None:
        self._state = torch.get_rng_state()

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()


def _random_devices(model: nn.Module) -> list[int]:
    """GPUs whose random state a run of the model may move."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
