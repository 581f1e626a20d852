"""Which backend is fastest, measured: for problems of the shapes and layouts at hand, on this machine, once.

What was measured is kept on disk, one small file a problem, so that later processes read it. A file's name is made of
everything that the answer depends on: the problem, the device, and the versions of torch, of this library and of the
compiled kernels. Processes that measure the same problem at once write the same file, each whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..numerics.precision import autocast_off
from ..version import __version__
from .backend import Backend, Request
from .problem import Problem, TensorSpec

CACHE_VARIABLE = "ATTNREWRITE_CACHE"
ROUNDS, LEAST_SECONDS = 5, 2e-3
SCHEMA = 1


def fastest(request: Request, able: Sequence[Backend]) -> Backend:
    """The backend of least median time among those that can run a request, from the disk if it was measured before."""
    seconds = _read(request, able)
    if seconds is None:
        seconds = measured(request, able)
        _write(request, able, seconds)
    return min(able, key=lambda backend: seconds[backend.name])


def measured(request: Request, able: Sequence[Backend]) -> dict[str, float]:
    """Median seconds of every backend, in rounds in which they take turns."""
    problem = _random(request.problem)
    calls = {backend.name: _call(request, problem, backend) for backend in able}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            times[name].append(_seconds(call, request.device))
    return {name: median(each[1:]) for name, each in times.items()}  # the first round warms up


def cache_folder() -> Path:
    """Where measurements are kept: below ``ATTNREWRITE_CACHE``, or the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnrewrite"
    return base / "autotune"


def _call(request: Request, problem: Problem, backend: Backend) -> Callable[[], object]:
    """What is timed: one direction, or both where the backward will have to run after the forward."""
    implementations = backend.implementations
    wanted = tuple(operand is not None for operand in problem.operands)

    def forward() -> object:
        return implementations[problem.name](problem)

    def backward() -> object:
        results = implementations[problem.name](problem)
        return implementations[f"{problem.name}_backward"](problem, results, results, wanted)

    return backward if request.backward or request.needs_gradient else forward


def _random(problem: Problem) -> Problem:
    """The same problem of random operands that lie in memory as the specs say."""
    specs: list[Any] = list(problem.operands)
    return problem.with_operands([None if spec is None else _operand(spec) for spec in specs])


def _operand(spec: TensorSpec) -> Tensor:
    made = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
    generator = torch.Generator(spec.device).manual_seed(0)  # the process's own random state stays as it is
    storage = made.as_strided((made.untyped_storage().nbytes() // made.element_size(),), (1,), 0)
    storage.normal_(generator=generator)
    return made


def _seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, from as many as take ``LEAST_SECONDS``."""
    calls, started = 0, time.perf_counter()
    with torch.no_grad(), autocast_off(device):
        while calls == 0 or time.perf_counter() - started < LEAST_SECONDS:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            calls += 1
    return (time.perf_counter() - started) / calls


def _path(request: Request, able: Sequence[Backend]) -> Path:
    """The file of a request's measurements, by all that they depend on."""
    processor = torch.cuda.get_device_name() if request.device == "cuda" else platform.processor()
    versions = (torch.__version__, __version__)
    states = [(backend.name, backend.version) for backend in able]
    depends = (SCHEMA, repr(request), processor, platform.machine(), torch.get_num_threads(), *versions, states)
    return cache_folder() / f"{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.json"


def _read(request: Request, able: Sequence[Backend]) -> dict[str, float] | None:
    """What an earlier process measured; None where nothing, or nothing legible, was kept."""
    try:
        kept = json.loads(_path(request, able).read_text())
        return {backend.name: float(kept["seconds"][backend.name]) for backend in able}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(request: Request, able: Sequence[Backend], seconds: dict[str, float]) -> None:
    """Keep measurements; a disk that is full or read-only costs measuring again, nothing else."""
    path = _path(request, able)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            json.dump({"request": repr(request), "seconds": seconds}, part)
        os.replace(part.name, path)
    except OSError:
        return
