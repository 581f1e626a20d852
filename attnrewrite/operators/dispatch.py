"""Which backend runs an operator.

A backend is a small object that says what it can run, at what modelled cost, and holds the implementations.
Choice: explicit argument, else the innermost `use_backend`, else the environment variable
`ATTNREWRITE_BACKEND`, else the cheapest backend that supports the request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, nearest

ENTRY_POINT_GROUP = "attnrewrite.backends"
ENVIRONMENT_VARIABLE = "ATTNREWRITE_BACKEND"


@dataclass(frozen=True)
class Request:
    """What is to be run: everything a backend may need to accept it and to model its cost.

    `window` is the kernel size or window size per axis; a geometry that the operator does not have is empty.
    `extra_keys` counts the keys beside those of the map; `batch` and `grid` are sizes of this very call.
    """

    operator: str
    device: str
    dtype: torch.dtype
    batch: int
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    value_dim: int
    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    shift: tuple[int, ...] = ()
    extra_keys: int = 0
    has_bias: bool = False
    needs_gradient: bool = False

    @property
    def rank(self) -> int:
        """Number of axes of the map."""
        return len(self.grid)


def _supports_all(request: Request) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run operators.

    `implementations` maps an operator's name (such as "local_attention", "local_attention_backward") to a
    function with the operator's arguments except `backend`. `supports` returns None, or the reason why not.
    `cost` models the run time in seconds; only its comparison with other backends counts.
    """

    name: str
    implementations: Mapping[str, Callable[..., tuple[Tensor, ...]]]
    cost: Callable[[Request], float]
    supports: Callable[[Request], str | None] = _supports_all

    def refusal(self, request: Request) -> str | None:
        """Why this backend cannot run the request, or None."""
        if request.operator not in self.implementations:
            return f"it does not implement {request.operator}"
        if request.needs_gradient and f"{request.operator}_backward" not in self.implementations:
            return f"it has no backward of {request.operator}"
        return self.supports(request)


_backends: dict[str, Backend] = {}
_override: ContextVar[str | None] = ContextVar("attnrewrite_backend", default=None)


def register_backend(backend: Backend) -> Backend:
    """Make a backend selectable by its name, which must be new. Raises `BackendError` for a name taken."""
    if _backends.setdefault(backend.name, backend) is not backend:
        raise BackendError(f"a backend named {backend.name!r} is already registered: choose another name")
    _selected.cache_clear()
    return backend


def available_backends() -> tuple[str, ...]:
    """Names of all backends: built in, registered, and installed under the entry-point group, sorted."""
    _discover()
    return tuple(sorted(_backends))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on the named backend. Raises `BackendError` for an unknown name."""
    _named(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def select_backend(request: Request, name: str | None = None) -> Backend:
    """The backend to run a request. Raises `BackendError` if the chosen one, or every one, refuses it."""
    chosen = name or _override.get() or os.environ.get(ENVIRONMENT_VARIABLE)
    return _selected(request, chosen or None)


def refusals(request: Request) -> dict[str, str | None]:
    """For every backend why it cannot run the request, or None where it can."""
    return {name: _backends[name].refusal(request) for name in available_backends()}


def run(request: Request, name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Run a request on the named (or, for an empty name, the best) backend.

    Autocast is off inside: a backend chooses its own precision, and it has the arguments it was promised.
    """
    implementation = select_backend(request, name).implementations[request.operator]
    with torch.autocast(request.device, enabled=False):
        return implementation(*arguments)


@cache
def _discover() -> None:
    import_module("attnrewrite.backends")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register_backend(entry.load())


def _named(name: str) -> Backend:
    known = available_backends()
    if name in known:
        return _backends[name]
    raise BackendError(f"unknown backend {name!r}, known are {', '.join(known)}{nearest(name, known)}")


@lru_cache(maxsize=1024)
def _selected(request: Request, name: str | None) -> Backend:
    if name is not None:
        backend = _named(name)
        if reason := backend.refusal(request):
            raise BackendError(f"backend {name!r} cannot run {request.operator}: {reason}")
        return backend
    reasons = refusals(request)
    able = [_backends[candidate] for candidate, reason in reasons.items() if reason is None]
    if not able:
        listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise BackendError(f"no backend can run {request.operator} ({listed})")
    return min(able, key=lambda backend: backend.cost(request))
