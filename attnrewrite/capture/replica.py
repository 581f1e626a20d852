"""A model in other module objects: what tracing it, or running it, does to a model is done to these.

Some models write to themselves in ``forward`` (a window size clamped to the map, a cached mask, a list of activations),
and hooks and modes are set for every thread that runs a module. Whoever looks at a model looks at its replica.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, fx, nn

Model = TypeVar("Model", bound=nn.Module)


def replica(model: Model, *, training: bool | None = None, own_buffers: bool = False) -> Model:
    """``model`` in module objects of the same classes, with containers of their own; in ``training`` mode or not, if
    that is given. Parameters, and whatever else the modules hold, are shared; buffers too, unless ``own_buffers`` asks
    for clones that a run may write to."""
    twin: Model = _Replicating(own_buffers).of(model)
    if training is not None:
        twin.train(training)  # whatever that returns: some models forget to
    return twin


def independent(model: Model) -> Model:
    """A deep copy, also of a model that holds what has none: values with a gradient history are copied without it, and
    read-only containers are shared."""
    made: dict[int, Any] = {}
    for value in _held(model):
        if not isinstance(value, Tensor):
            made |= {} if _has_copy(value) else {id(value): value}
        elif not value.is_leaf:
            made[id(value)] = value.detach().clone()
    twin = copy.deepcopy(model, made)
    for copied, module in zip(twin.modules(), model.modules(), strict=True):
        copied.training = module.training  # an fx.GraphModule is copied as its graph, in training mode
    return twin


def without_hooks(model: Model) -> Model:
    """A replica on which no hook of the model's fires."""
    twin = replica(model)
    for module in twin.modules():
        for name, hooks in vars(module).items():
            if "hook" in name and "forward" in name and hooks:
                hooks.clear()
    return twin


def importable_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``; of an ``fx.GraphModule``, which has a class to itself, that from which this is made."""
    kind = type(module)
    if isinstance(module, fx.GraphModule) and kind.__qualname__.endswith("GraphModuleImpl"):
        return kind.__bases__[0]
    return kind


def class_for(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a new module: ``kind``, or for an ``fx.GraphModule`` another one to itself."""
    return type(kind.__new__(kind)) if issubclass(kind, fx.GraphModule) else kind


class _Replicating:
    def __init__(self, own_buffers: bool) -> None:
        self.own_buffers = own_buffers
        self.made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.of(value.__self__))
        if type(value) is partial:
            return partial(self.of(value.func), *map(self.of, value.args), **self._items(value.keywords))
        if type(value) is tuple:
            return tuple(map(self.of, value))
        return self._container(value) if isinstance(value, list | dict | set | deque) else value

    def _module(self, module: nn.Module) -> nn.Module:
        twin = object.__new__(class_for(importable_class(module)))
        self.made[id(module)] = twin
        for name, value in vars(module).items():
            twin.__dict__[name] = self._buffers(value) if name == "_buffers" else self.of(value)
        for name in _slots(type(module)):
            if hasattr(module, name):
                object.__setattr__(twin, name, self.of(getattr(module, name)))
        if isinstance(twin, fx.GraphModule):
            twin.recompile()  # its class has the code of its graph
        return twin

    def _buffers(self, buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: self._buffer(value) for name, value in buffers.items()}

    def _buffer(self, value: Tensor | None) -> Tensor | None:
        if value is None or not self.own_buffers:
            return value
        if id(value) not in self.made:
            self.made[id(value)] = value.detach().clone()
        twin: Tensor = self.made[id(value)]
        return twin

    def _items(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self.of(value) for key, value in values.items()}

    def _container(self, container: Any) -> Any:
        """Of the same kind, with replicas of what it holds; the container itself if it does not let that be."""
        try:
            twin = self.made[id(container)] = copy.copy(container)
            if isinstance(container, dict):
                for key, value in self._items(container).items():
                    if value is not container[key]:
                        twin[key] = value
            elif isinstance(container, list | deque):
                for place, value in enumerate(map(self.of, container)):
                    if value is not container[place]:
                        twin[place] = value
        except Exception:  # read-only, or made by arguments that it does not keep: then it is no forward's either
            twin = self.made[id(container)] = container
        return twin


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__"))


def _held(model: nn.Module) -> Iterator[Any]:
    """Tensors and containers that modules hold beside their parameters and buffers, and those within."""
    pending: list[Any] = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict | set | deque) and id(value) not in seen:
            yield value
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value


def _has_copy(container: Any) -> bool:
    try:
        return len(copy.copy(container)) == len(container)
    except Exception:  # whatever a read-only one says to being filled
        return False
