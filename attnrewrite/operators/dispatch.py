"""Which backend runs an operator.

A backend is a small object that says what it can run, at what modelled cost, and holds the implementations. Backends
are not listed: every module and package directly below ``attnrewrite.backends`` is looked through when the first
operator runs, and other packages bring theirs by an entry point of the group ``attnrewrite.backends`` whose value is a
``Backend``. Choice: explicit argument, else the innermost ``use_backend``, else the environment variable
``ATTNREWRITE_BACKEND``, else the cheapest backend that supports the request.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, first_line, nearest

BACKENDS = "attnrewrite.backends"
ENTRY_POINT_GROUP = BACKENDS
ENVIRONMENT_VARIABLE = "ATTNREWRITE_BACKEND"


@dataclass(frozen=True)
class Request:
    """What is to be run: everything a backend may need to accept it and to model its cost.

    ``window`` is the kernel size or window size per axis; a geometry that the operator does not have is empty.
    ``extra_keys`` counts the keys beside those of the map; ``batch`` and ``grid`` are sizes of this very call.
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


Implementation = Callable[..., tuple[Tensor, ...]]


class Deferred(Mapping[str, Implementation]):
    """Functions of ``module``, by their names; it is imported when the first of them is taken.

    So a backend can be listed, asked and costed on machines that cannot import what it runs on.
    """

    def __init__(self, module: str, *names: str) -> None:
        self.module, self.names = module, names

    def __getitem__(self, name: str) -> Implementation:
        """
        Raises:
            BackendError: the module cannot be imported.
        """
        if name not in self.names:
            raise KeyError(name)
        try:
            function: Implementation = getattr(import_module(self.module), name)
        except (ImportError, OSError) as cause:
            raise BackendError(
                f"{self.module} could not be imported ({type(cause).__name__}: {first_line(cause)}); "
                "choose another backend with attnrewrite.lowering.use_backend"
            ) from cause
        return function

    def __contains__(self, name: object) -> bool:  # a mapping's own takes the value, and so would import
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _supports_all(request: Request) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run operators.

    ``implementations`` maps an operator's name (such as "local_attention", "local_attention_backward") to a function
    with the operator's arguments except ``backend``. ``supports`` returns None, or the reason why not. ``cost`` models
    the run time in seconds; only its comparison with other backends counts. ``requires`` names packages that must be
    importable, ``devices`` the device types that it runs on (none: any). The module that makes the object must import
    without them; ``Deferred`` implementations, or imports inside functions, wait for the first run.
    """

    name: str
    implementations: Mapping[str, Implementation]
    cost: Callable[[Request], float]
    supports: Callable[[Request], str | None] = _supports_all
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def refusal(self, request: Request) -> str | None:
        """Why this backend cannot run the request, or None."""
        if missing := [package for package in self.requires if not _is_importable(package)]:
            return f"it requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        if self.devices and request.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and the operands are on {request.device}"
        if request.operator not in self.implementations:
            return f"it does not implement {request.operator}"
        if request.needs_gradient and f"{request.operator}_backward" not in self.implementations:
            return f"it has no backward of {request.operator}"
        return self.supports(request)


@dataclass(frozen=True, eq=False)
class _Broken(Backend):
    """An installed backend that cannot be imported: it refuses everything, with the ``reason``."""

    reason: str = ""

    def refusal(self, request: Request) -> str | None:
        return self.reason


_backends: dict[str, Backend] = {}
_override: ContextVar[str | None] = ContextVar("attnrewrite_backend", default=None)


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


def select_backend(request: Request, name: str | None = None) -> Backend:
    """The backend to run a request. Raises ``BackendError`` if the chosen one, or every one, refuses it."""
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


@cache
def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # of a package above it; a stand-in in sys.modules has no spec
        return False


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
