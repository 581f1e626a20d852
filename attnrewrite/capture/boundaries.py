"""The boundary of every module call: which graph values go in, which come out, and when.

``nn_module_stack`` says which call a node belongs to, but not what a call's arguments were, nor that a module without
nodes (an inactive DropPath, an Identity) was called at all. Forward hooks see both while the graph is being traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._pytree import tree_leaves, tree_map

from .autocast_regions import Interval, idle_regions
from .module_call import ModuleCall, NodeRef, class_name
from .sizes import plain

_MARK = "attnrewrite_position"


class BoundaryRecorder:
    """Hooks on every module of the ``traced`` replica of a model that write down each call during an export, as one of
    the model's own modules. ``uncast`` are the regions in which its code has autocast turned off.
    """

    def __init__(self, model: nn.Module, traced: nn.Module) -> None:
        self.root: ModuleCall | None = None
        self.uncast: list[Interval] = []
        self._open: list[ModuleCall] = []
        self._model, self._traced = model, traced

    def running(self) -> ModuleCall | None:
        """The call that is being traced."""
        return self._open[-1] if self._open else None

    def attach(self) -> None:
        """Hook the replica."""
        for (path, module), traced in zip(self._model.named_modules(), self._traced.modules(), strict=True):
            traced.register_forward_pre_hook(self._enter(path, module), with_kwargs=True)
            traced.register_forward_hook(self._exit, with_kwargs=True, prepend=True)

    def calls(self, final: dict[int, Node], resolved: Callable[[Any], Any]) -> ModuleCall:
        """The tree of calls, with every reference resolved to a node of the final graph, and sizes by ``resolved``."""
        assert self.root is not None, "the model's own forward was traced"
        for call in self.root.walk():
            call.arguments = tree_map(lambda leaf: _resolve(leaf, final), call.arguments)
            call.output = tree_map(lambda leaf: _resolve(leaf, final), call.output)
            call.sizes = [None if term is None else resolved(term) for term in call.sizes]
        return self.root

    def _enter(self, path: str, module: nn.Module) -> Any:
        def hook(_traced_as: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = bind_arguments(module, args, kwargs)
            parent = self._open[-1] if self._open else None
            kind = class_name(type(module))
            call = ModuleCall(path, kind, trace_length(), tree_map(_traced, arguments), parent=parent)
            call.sizes = [getattr(leaf, "term", None) for leaf in tree_leaves(arguments)]
            if parent is None:
                self.root, self._open = call, []
                self.uncast = idle_regions()
                _tracer().record_stack_traces = False  # of every node: a tenth of an export's time, and nobody reads it
            else:
                parent.children.append(call)
            self._open.append(call)

        return hook

    def _exit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._open.pop()
        call.exit = trace_length()
        call.output = tree_map(_traced, output)
        if self._open:
            return None
        _mark_positions()
        return tree_map(plain, output)  # an exporter takes no numbers but Python's own as results


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, defaults filled in, so that every spelling of one call looks the same."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def positions(nodes: Iterator[Node]) -> dict[Node, int]:
    """Trace position of every node of the final graph that has one."""
    return {node: node.meta["custom"][_MARK] for node in nodes if _MARK in node.meta.get("custom", {})}


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None, "boundaries are recorded while tracing"
    return mode.tracer


def trace_length() -> int:
    """The trace position of what comes next."""
    return len(_tracer().graph.nodes)


def _traced(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return plain(leaf)
    slot = get_proxy_slot(leaf, _tracer(), None)
    return NodeRef(None if slot is None else slot.proxy.node)


def _mark_positions() -> None:
    for position, node in enumerate(_tracer().graph.nodes):
        node.meta.setdefault("custom", {})[_MARK] = position


def _resolve(leaf: Any, final: dict[int, Node]) -> Any:
    """From a node of the trace to the same node of the exported graph, through the position both carry."""
    if not isinstance(leaf, NodeRef) or leaf.node is None:
        return leaf
    return NodeRef(final_node(leaf.node, final))


def final_node(traced: Node, final: dict[int, Node]) -> Node | None:
    """The same node in the exported graph, if it has it."""
    return final.get(traced.meta["custom"][_MARK])
