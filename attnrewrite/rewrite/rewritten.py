"""A module whose forward was rewritten: the donor object itself, in a subclass of its own class.

The object stays, so its children, parameters, hooks, names and everything that refers to it stay. The class is made
from the donor's, so ``isinstance`` and the donor's methods stay. ``torch.nn.utils.parametrize`` works the same way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import new_class
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.replica import class_for, importable_class
from .hooks import is_quiet, silence, stay_called, unsilence
from .program import Program
from .saved_state import loaded_like, marks_of


@dataclass
class Rewriting:
    """What was done to one module: its program, and the children and buffers that were added for it.

    ``dropped`` are the children and parameters that were taken out, each with its parent's path, whether it is one of
    the parent's ``_modules`` or ``_parameters``, and what the parent had there, in order.
    ``silent`` are the paths of children that are not called any more. ``previous`` is an earlier rewriting of the same
    module.
    """

    program: Program
    donor_class: type[nn.Module]
    modules: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    previous: Rewriting | None = None


class RewrittenModule:
    """Marks every rewritten class. ``attnrewrite_rewriting`` says what was done.

    The last of its bases, and without an attribute of its own: an object's class can only be exchanged for one of the
    same layout, which the donor's first base decides.
    """

    __slots__ = ()
    attnrewrite_rewriting: Rewriting


def rewrite_module(
    module: nn.Module,
    program: Program,
    modules: dict[str, nn.Module],
    buffers: dict[str, Tensor],
    dropped: Sequence[str] = (),
    targets: Iterable[str] = (),
) -> None:
    """Give ``module`` the new forward, in place. Its state says from then on what it was converted to, by their names:
    strict loading into another model reports that.
    """
    previous: Rewriting | None = module.__dict__.get("attnrewrite_rewriting")
    donor_class = importable_class(module) if previous is None else previous.donor_class
    kind, parameter = rewritten_class(donor_class), next(module.parameters(), None)
    # noted before it is done: what stops this half-way leaves something that can be restored
    done = module.__dict__["attnrewrite_rewriting"] = Rewriting(program, donor_class, previous=previous)
    for path in dropped:  # first: what was there before is what revert restores
        _take_out(module, path, done)
    for name, child in modules.items():
        child.train(module.training)
        done.modules.append(name)
        module.add_module(name, child if parameter is None else child.to(parameter.device))
    for name, value in buffers.items():
        done.buffers.append(name)
        module.register_buffer(name, value, persistent=False)
    for mark in marks_of(targets) - module._buffers.keys():
        done.buffers.append(mark)
        module.register_buffer(mark, torch.zeros(1, device=None if parameter is None else parameter.device))
    if isinstance(module, nn.MultiheadAttention) and previous is None:
        module.register_forward_pre_hook(stay_called)
    module.__class__ = kind


def tell_of_hooks(module: nn.Module, path: str, dissolved: Sequence[str]) -> None:
    """Warn whoever registers a hook on a child, at one of the ``dissolved`` paths, that ``module``, which is the
    model's at ``path``, does not call any more."""
    known = dict(module.named_modules(remove_duplicate=False))  # not all: some were taken out
    children = [(name, known[name]) for name in dissolved if name in known]
    done: Rewriting = module.__dict__["attnrewrite_rewriting"]
    for name, child in children:
        if is_quiet(child):
            done.silent.append(name)
            silence(child, f"{path}.{name}" if path else name)


def restore_module(module: nn.Module) -> None:
    """Undo ``rewrite_module``."""
    done: Rewriting = module.__dict__["attnrewrite_rewriting"]
    known = dict(module.named_modules(remove_duplicate=False))
    for child in (known[name] for name in done.silent if name in known):  # some may have been deleted
        unsilence(child)
    for name in (*done.modules, *done.buffers):
        module._modules.pop(name, None)
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    for path, kind, parts in reversed(done.dropped):
        module.get_submodule(path).__dict__[kind] = dict(parts)
    if done.previous is not None:
        module.__dict__["attnrewrite_rewriting"] = done.previous
        return
    del module.__dict__["attnrewrite_rewriting"]
    module.__class__ = class_for(done.donor_class)
    if isinstance(module, fx.GraphModule):
        module.recompile()  # its class has the code of its graph
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is stay_called]:
        del module._forward_pre_hooks[key]


def _take_out(module: nn.Module, path: str, done: Rewriting) -> None:
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    kind = "_parameters" if name in holder._parameters else "_modules"
    parts = getattr(holder, kind)
    left = None if kind == "_parameters" else RemovedModule(module.get_submodule(path))
    done.dropped.append((parent, kind, dict(parts)))
    parts[name] = left


class RemovedModule(nn.Module):
    """Stands where a child was whose work a core does now.

    It holds no parameter; its empty ``weight`` tells dtype and device, which models ask of their first convolution.
    """

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.register_buffer("weight", next(child.parameters()).detach().new_empty(0), persistent=False)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def rewritten_class(donor_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of the donor's class with the rewritten forward; one for each donor class."""
    if donor_class not in _CLASSES:
        own = {
            "__module__": __name__,
            "__doc__": donor_class.__doc__,
            "__reduce_ex__": _reduced_like(donor_class),
            "forward": _forward_like(donor_class),
            "_load_from_state_dict": loaded_like(donor_class),
            **(_OF_GRAPH if issubclass(donor_class, fx.GraphModule) else {}),
        }
        bases = (donor_class, RewrittenModule)
        _CLASSES[donor_class] = new_class(f"Rewritten{donor_class.__name__}", bases, {}, lambda body: body.update(own))
    return _CLASSES[donor_class]


def _reduced_like(donor_class: type[nn.Module]) -> Callable[[Any, Any], Any]:
    """The class is made at run time: restore it from the donor's class, which can be imported."""

    def __reduce_ex__(self: RewrittenModule, protocol: Any) -> Any:
        if isinstance(self, fx.GraphModule):
            return _empty_rewritten, (self.attnrewrite_rewriting.donor_class,), dict(vars(self))
        reduced: Any = donor_class.__reduce_ex__(self, protocol)
        return (_empty_rewritten, (self.attnrewrite_rewriting.donor_class,), *reduced[2:])

    return __reduce_ex__


def _deepcopied(self: Any, memo: dict[int, Any]) -> Any:
    twin = memo[id(self)] = _empty_rewritten(self.attnrewrite_rewriting.donor_class)
    twin.__dict__.update(copy.deepcopy(vars(self), memo))
    return twin


_OF_GRAPH = {"__deepcopy__": _deepcopied, "recompile": lambda self: None}
"""An ``fx.GraphModule`` is copied as its graph, and made anew from it: neither knows what was rewritten."""


def _forward_like(donor_class: type[nn.Module]) -> Callable[..., Any]:
    """The rewritten forward under the donor's signature, by which trainers, tracers and exporters know the arguments.

    ``torch.fx`` is told that a rewritten module is a leaf. Where it is the root of what is traced, its own steps are.
    """

    @functools.wraps(donor_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program: Program = self.attnrewrite_rewriting.program
        proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if proxy is None:
            return program.forward(self, *args, **kwargs)
        tracer: Any = proxy.tracer
        if self is not tracer.root:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return program.traced_by(tracer)(self, *args, **kwargs)

    return forward


def _empty_rewritten(donor_class: type[nn.Module]) -> nn.Module:
    return object.__new__(rewritten_class(donor_class))
