"""Which backend runs an operator.

A backend is a small object that says what it can run, at what modelled cost, and holds the implementations. Backends
are not listed: every module and package directly below ``attnrewrite.backends`` is looked through when the first
operator runs, and other packages bring theirs by an entry point of the group ``attnrewrite.backends`` whose value is a
``Backend``. Choice: explicit argument, else the innermost ``use_backend``, else the environment variable
``ATTNREWRITE_BACKEND``, else, of the backends that support the request, the one of least modelled cost, or with
``autotune`` (or ``ATTNREWRITE_AUTOTUNE=1``) the one that was measured to be fastest.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import Tensor

from ..errors import BackendError, first_line, nearest
from ..numerics.precision import autocast_off
from .autotune import fastest
from .backend import Backend, Request
from .problem import Problem

BACKENDS = "attnrewrite.backends"
ENTRY_POINT_GROUP = BACKENDS
ENVIRONMENT_VARIABLE = "ATTNREWRITE_BACKEND"
AUTOTUNE_VARIABLE = "ATTNREWRITE_AUTOTUNE"


@dataclass(frozen=True, eq=False)
class _Broken(Backend):
    """An installed backend that cannot be imported: it refuses everything, with the ``reason``."""

    reason: str = ""

    def refusal(self, request: Request) -> str | None:
        return self.reason


_backends: dict[str, Backend] = {}
_override: ContextVar[str | None] = ContextVar("attnrewrite_backend", default=None)
_autotuning: ContextVar[bool | None] = ContextVar("attnrewrite_autotune", default=None)


def register_backend(backend: Backend) -> Backend:
    """Make a backend selectable by its name, which must be new. Raises ``BackendError`` for a name taken."""
    _discover_built_in()
    return _registered(backend)


def available_backends() -> tuple[str, ...]:
    """Names of all backends: built in, registered, and installed under the entry-point group, sorted."""
    _discover()
    return tuple(sorted(_backends))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on the named backend. Raises ``BackendError`` for an unknown name."""
    _named(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Choose backends inside by measured time instead of by modelled cost, or (``enabled=False``) not.

    The first call of an operator with operands of new shapes or layouts runs it on every backend that can, on numbers
    of its own; what was found is kept on disk (below ``ATTNREWRITE_CACHE``, or the user's cache folder) for later
    processes on the same machine with the same versions.
    """
    token = _autotuning.set(enabled)
    try:
        yield
    finally:
        _autotuning.reset(token)


def select_backend(request: Request, name: str | None = None) -> Backend:
    """The backend to run a request. Raises ``BackendError`` if the chosen one, or every one, refuses it."""
    chosen = name or _override.get() or os.environ.get(ENVIRONMENT_VARIABLE)
    return _selected(request, chosen or None, _is_autotuning())


def refusals(request: Request) -> dict[str, str | None]:
    """For every backend why it cannot run the request, or None where it can."""
    return {name: _backends[name].refusal(request) for name in available_backends()}


def run(problem: Problem, name: str) -> tuple[Tensor, ...]:
    """The results of a problem on the named (or, for an empty name, the best) backend.

    Autocast is off inside: a backend chooses its own precision, and it has the operands it was promised.
    """
    request = Request.of(problem)
    return run_on(select_backend(request, name), request, problem)


def run_on(backend: Backend, request: Request, problem: Problem) -> tuple[Tensor, ...]:
    """The same on a backend that was selected for the request."""
    with autocast_off(request.device):
        found: Any = backend.implementations[request.operator](problem)
    return found


def run_backward(
    problem: Problem,
    results: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    name: str,
) -> tuple[Tensor | None, ...]:
    """The gradients of a problem's operands, as ``run``."""
    request = Request.of(problem, backward=True)
    with autocast_off(request.device):
        implementation = select_backend(request, name).implementations[request.operator]
        return implementation(problem, results, gradients, wanted)


@cache
def _discover_built_in() -> None:
    package = import_module(BACKENDS)
    for found in pkgutil.iter_modules(package.__path__, f"{BACKENDS}."):
        for value in vars(import_module(found.name)).values():
            if isinstance(value, Backend):
                _registered(value)


@cache
def _discover() -> None:
    _discover_built_in()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            _registered(_installed(entry))
        except BackendError as cause:
            raise BackendError(f"entry point {entry.name!r} of {ENTRY_POINT_GROUP}: {cause}") from cause


def _installed(entry: EntryPoint) -> Backend:
    """The backend of another package; where it does not import, one that says so when it is asked."""
    try:
        backend = entry.load()
    except Exception as cause:  # whatever somebody else's module raises
        return _broken(entry.name, f"{entry.value} could not be imported ({type(cause).__name__}: {first_line(cause)})")
    if not isinstance(backend, Backend):
        raise BackendError(f"expected a Backend, got {backend!r}; name the object, as in 'package.module:BACKEND'")
    return backend


@cache  # a repeated discovery finds the same object, not a taken name
def _broken(name: str, reason: str) -> Backend:
    return _Broken(name, {}, lambda request: float("inf"), reason=reason)


def _registered(backend: Backend) -> Backend:
    if _backends.setdefault(backend.name, backend) is not backend:
        raise BackendError(f"a backend named {backend.name!r} is already registered: choose another name")
    _selected.cache_clear()
    return backend


def _named(name: str) -> Backend:
    known = available_backends()
    if name in known:
        return _backends[name]
    raise BackendError(f"unknown backend {name!r}, known are {', '.join(known)}{nearest(name, known)}")


@lru_cache(maxsize=1024)
def _selected(request: Request, name: str | None, by_time: bool) -> Backend:
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
    if by_time and len(able) > 1:
        return fastest(request, able)
    return min(able, key=lambda backend: backend.cost(request))


def _is_autotuning() -> bool:
    chosen = _autotuning.get()
    return os.environ.get(AUTOTUNE_VARIABLE, "") not in ("", "0") if chosen is None else chosen
