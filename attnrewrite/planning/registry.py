"""Which targets and recognizers there are: those in ``patterns``, and those that other packages bring.

Nothing is listed: whatever module lies there is looked through. A package brings its own by an entry point of the group
``attnrewrite.patterns`` whose value is a module.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from ..errors import ArgumentError, first_line, nearest
from ..graph.dataflow import Dataflow
from ..ir.contract import Recognizer, Target
from ..ir.sites import Refused, Site

ENTRY_POINT_GROUP = "attnrewrite.patterns"

_targets: dict[str, type[Target]] = {}
_recognizers: list[Recognizer] = []


def register_target(target: type[Target]) -> type[Target]:
    """Make a target known under its name, which must be new. Usable as a class decorator.

    Raises:
        ArgumentError: another target has the name.
    """
    _discover_built_in()
    return _registered(target)


def known_targets() -> dict[str, type[Target]]:
    """Targets by name, in the order in which they were found."""
    _discover()
    return dict(_targets)


def recognize_all(flow: Dataflow) -> list[Site | Refused]:
    """Run every recognizer, in order; each is given the sites found before it."""
    _discover()
    found: list[Site | Refused] = []
    for recognizer in _recognizers:
        found += recognizer(flow, [site for site in found if not isinstance(site, Refused)])
    return found


def target_of(to: str | Target, options: Mapping[str, Any] | None = None) -> Target:
    """A target by name with options, or a target object as it is.

    Raises:
        ArgumentError: unknown name (the nearest known one is suggested) or unknown option.
    """
    if isinstance(to, Target):
        if options:
            raise ArgumentError(f"to: options {sorted(options)} go into the target object {to}, not beside it")
        return to
    known = known_targets()
    if not isinstance(to, str) or to not in known:
        raise ArgumentError(
            f"to: unknown target {to!r}{nearest(str(to), known)}; known targets: {', '.join(sorted(known))}"
        )
    try:
        return known[to](**(options or {}))
    except TypeError as cause:
        names = ", ".join(getattr(known[to], "__dataclass_fields__", {}))
        raise ArgumentError(
            f"to: target {to!r} does not take {sorted(options or {})}; it takes: {names or 'nothing'}"
        ) from cause


@cache
def _discover_built_in() -> None:
    for module in _modules_below("attnrewrite.patterns"):
        _look_through(module)


@cache
def _discover() -> None:
    _discover_built_in()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _look_through(_installed(entry))


def _look_through(module: ModuleType) -> None:
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue  # what it imports is another module's
        if inspect.isclass(value) and issubclass(value, Target) and value.name:
            _registered(value)
        elif inspect.isfunction(value) and hasattr(value, "order") and value not in _recognizers:
            _recognizers.append(value)
            _recognizers.sort(key=lambda recognizer: recognizer.order)  # type: ignore[attr-defined]  # set by its mark


def _installed(entry: EntryPoint) -> ModuleType:
    """The module that another package brings."""
    try:
        module = entry.load()
    except Exception as cause:  # whatever somebody else's module raises
        raise ArgumentError(
            f"entry point {entry.name!r} of {ENTRY_POINT_GROUP}: {entry.value} could not be imported "
            f"({type(cause).__name__}: {first_line(cause)}); repair or uninstall the package"
        ) from cause
    if not isinstance(module, ModuleType):
        raise ArgumentError(
            f"entry point {entry.name!r} of {ENTRY_POINT_GROUP}: expected a module, got {module!r}; "
            "leave out what follows the colon"
        )
    return module


def _modules_below(package: str) -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        yield import_module(found.name)
        if found.ispkg:
            yield from _modules_below(found.name)


def _registered(target: type[Target]) -> type[Target]:
    if _targets.setdefault(target.name, target) is not target:
        raise ArgumentError(
            f"target: {target.__qualname__} takes the name {target.name!r}, which {_targets[target.name].__qualname__} "
            "has; choose another name"
        )
    return target
