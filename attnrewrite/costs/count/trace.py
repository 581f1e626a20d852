"""One forward call on the meta device, every operation priced where it happens. Nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...capture.boundaries import bind_arguments
from ...numerics.private_kernels import private_kernel
from .autocast_regions import off_on_meta
from .cost import Cost, total
from .declared import declared_cost, is_counted_by_formula
from .dispatch import Dispatcher, Known, shapes_of
from .op_costs import name_of, storage_key

_NOTHING = Cost()


@dataclass(frozen=True)
class Call:
    """One priced operation of the forward pass: where, what, on which shapes."""

    module: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    cost: Cost


@dataclass(frozen=True)
class Unpriced:
    """An operation that computes and whose price is not known: it counts nothing, and says so."""

    module: str
    operator: str
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        return f"{self.operator} in {self.module or '(root)'} on {shapes}"


@dataclass
class Trace:
    """Every operation of one call, in order.

    ``backward`` is the total of the backward pass, if one was run; ``peak`` the most bytes of activations alive at
    once, the input included and parameters not. ``defined`` are the modules counted by their definition, and
    ``executed`` the MACs of all contractions that took place, theirs too.
    """

    calls: list[Call] = field(default_factory=list)
    unpriced: list[Unpriced] = field(default_factory=list)
    module_calls: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    backward: Cost = field(default_factory=Cost)
    peak: int = 0
    executed: int = 0
    defined: list[str] = field(default_factory=list)
    _of: dict[str, Cost] = field(default_factory=dict, repr=False)

    @cached_property
    def total(self) -> Cost:
        return replace(total(call.cost for call in self.calls), saved=sum(self.saved.values()))

    def of(self, path: str) -> Cost:
        """Of a module with all that is inside it."""
        if path not in self._of:
            self._of[path] = self._summed(path)
        return self._of[path]

    def _summed(self, path: str) -> Cost:
        inside = (call.cost for call in self.calls if _within(call.module, path))
        saved = sum(size for module, size in self.saved.items() if _within(module, path))
        return replace(total(inside), saved=saved)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = False) -> Trace:
    """Price a call of a meta model on meta inputs.

    Args:
        training: with gradients, followed by the backward pass of the sum of all outputs.
    """
    found = Trace()
    recorder = _Recorder(found, model, (args, kwargs))
    with _modules_noted(model, recorder), off_on_meta(), ExitStack() as modes:
        modes.enter_context(torch.set_grad_enabled(training))
        if training:
            modes.enter_context(saved_tensors_hooks(recorder.save, lambda tensor: tensor))
            modes.enter_context(_FusedAttention())
        modes.enter_context(recorder)
        output = model(*args, **kwargs)
        if training:
            recorder.in_backward = True
            loss = sum(leaf.sum() for leaf in tree_leaves(output) if _has_gradient(leaf))
            if isinstance(loss, Tensor):
                loss.backward()
            recorder.finish()
    return found


class _Recorder(TorchDispatchMode):
    """Prices what is dispatched; knows the module by the hooks, and the living storages by weak references."""

    def __init__(self, found: Trace, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.found, self.path, self.in_backward = found, [""], False
        self.by_definition: str | None = None
        self._parameters = {storage_key(p) for p in [*model.parameters(), *model.buffers()]}
        self._dispatcher, self._backward = Dispatcher(), list[Cost]()
        self._living: dict[int, int] = {}
        self._alive = 0
        self._watches: list[Any] = []
        self._saved: set[int] = set()
        for leaf in tree_leaves(inputs):
            self._note_alive(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, known = self._dispatcher.run(func, args, kwargs or {})
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            self._note_alive(leaf)
        if known.cost is None:
            self._note_unpriced(func, known, result)
        elif self.in_backward:
            self._backward.append(known.cost)
        else:
            self._note(func, known, known.cost)
        return result

    def finish(self) -> None:
        """Sum up the backward pass."""
        self.found.backward = total(self._backward)

    def define(self, path: str, cost: Cost, shapes: tuple[tuple[int, ...], ...]) -> None:
        """From here to ``path``'s end, operations count no MACs of their own."""
        self.by_definition = path
        self.found.defined.append(path)
        self.found.calls.append(Call(path, "by definition", shapes, cost))

    def _note(self, func: Any, known: Known, cost: Cost) -> None:
        self.found.executed += cost.macs
        if self.by_definition is not None and cost.macs:
            cost = replace(cost, macs=0)
        if cost != _NOTHING:
            self.found.calls.append(Call(self.path[-1], name_of(func), known.shapes, cost))

    def save(self, tensor: Tensor) -> Tensor:
        """What autograd keeps, each storage once."""
        key = storage_key(tensor)
        if key not in self._saved and key not in self._parameters:
            self._saved.add(key)
            size = tensor.untyped_storage().nbytes()
            self.found.saved[self.path[-1]] = self.found.saved.get(self.path[-1], 0) + size
        return tensor

    def _note_alive(self, leaf: Any) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage, key = leaf.untyped_storage(), storage_key(leaf)
        if key in self._living or key in self._parameters:
            return
        self._living[key] = storage.nbytes()
        self._alive += storage.nbytes()
        self._watches.append(weakref.ref(storage, partial(self._forget, key)))
        self.found.peak = max(self.found.peak, self._alive)

    def _forget(self, key: int, _: Any) -> None:
        self._alive -= self._living.pop(key, 0)

    def _note_unpriced(self, func: Any, known: Known, result: Any) -> None:
        if any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves(result)):
            self.found.unpriced.append(Unpriced(self.path[-1], name_of(func), known.shapes))


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it, which keep a row of log-sum-exps instead of the attention map.

    The meta device would take the unfused path, whose memory no accelerator needs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and _fusable(*args, **kwargs):
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fusable(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **options: Any) -> bool:
    plain_mask = attn_mask is None or attn_mask.dtype == query.dtype
    return query.ndim == key.ndim == 4 and not options.get("enable_gqa") and plain_mask


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    arguments = (query, key, value, attn_mask, True, dropout_p, is_causal)
    output: Tensor = private_kernel("_scaled_dot_product_efficient_attention", *arguments, scale=scale)[0]
    return output


@contextmanager
def _modules_noted(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            recorder.path.append(path)
            recorder.found.module_calls[path] = recorder.found.module_calls.get(path, 0) + 1
            if recorder.by_definition is None and is_counted_by_formula(module):
                cost = declared_cost(module, bind_arguments(module, args, kwargs))
                if cost is not None:
                    recorder.define(path, cost, shapes_of(args))

        return hook

    def leave(*_: Any) -> None:
        if recorder.path.pop() == recorder.by_definition:
            recorder.by_definition = None

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")
