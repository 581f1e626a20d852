"""Timing side by side: all methods in one process, in turns, so that a noisy machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median and quartiles, in seconds."""

    median: float
    lower: float
    upper: float


def interleaved(methods: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Timing]:
    """Time every method once a round, each after an untimed call.

    The untimed call gives a method its own memory back: allocators return what the method before it freed.
    """
    clock = _cuda_seconds if device == "cuda" else _wall_seconds
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            method()
            seconds[name].append(clock(method))
    return {name: _summary(each) for name, each in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(*seconds * 3)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper)


def _wall_seconds(method: Callable[[], object]) -> float:
    start = time.perf_counter()
    method()
    return time.perf_counter() - start


def _cuda_seconds(method: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    method()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
