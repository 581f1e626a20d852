"""Random numbers that leave the caller's as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def same_draws(tensors: Iterable[Any]) -> Iterator[None]:
    """Whatever is random inside comes out the same every time; the random state is as before on exit, also that of the
    GPUs on which any of ``tensors`` lies."""
    with torch.random.fork_rng(devices=_random_devices(tensors)):
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


def _random_devices(tensors: Iterable[Any]) -> list[int]:
    held = (value for value in tensors if isinstance(value, Tensor))
    return sorted({value.device.index or 0 for value in held if value.device.type == "cuda"})
