"""The second source of captured graphs: what ``torch.compile`` hands to a backend.

Dynamo gives a graph of torch's functions, whose placeholders are the inputs, and the parameters and buffers that the
model holds. Traced once more, above autograd, it is an ATen graph in the spelling of an export; every node says in
which modules' calls it was made.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import AttrSource, ChainedSource, DictGetItemSource
from torch._guards import Source, tracing
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_map

from ..errors import CaptureError
from .captured_graph import CapturedGraph
from .in_place import restate_in_place
from .module_call import ModuleCall, NodeRef, class_name
from .sizes import SizeRecord

_CONTAINERS = ("_modules", "_parameters", "_buffers")
"""Attributes of a module that hold what it is asked for by name."""


def captured_by_dynamo(compiled: fx.GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
    """The ATen graph of what a backend of ``torch.compile`` is given, in eval mode and at fixed sizes. Its placeholders
    are those of ``compiled``, in order, and then its own constants, which have no names.

    Calls of modules are what the nodes say: a call that leaves no node is none, and one module called twice in a row is
    one call.

    Raises:
        CaptureError: sizes are symbols, or autocast or the gradient mode changes on the way.
    """
    if not all(isinstance(value, Tensor) for value in example_inputs):
        raise CaptureError("the graph has symbolic sizes; compile with dynamic=False")
    with tracing(None), preserve_node_meta(), torch.no_grad():
        traced = make_fx(fx.Interpreter(compiled).run, tracing_mode="fake", pre_dispatch=True)(*example_inputs)
    graph = traced.graph
    _require_operators(graph)
    placeholders = graph.find_nodes(op="placeholder")
    tensors = dict(zip(placeholders, example_inputs, strict=True)) | _constants(traced)
    restate_in_place(graph)
    sources = {
        node: source._dynamo_source  # it is where ahead-of-time autograd looks, too
        for node, source in zip(placeholders, compiled.graph.find_nodes(op="placeholder"), strict=True)
    }
    names = {node: ".".join(_path(source)) for node, source in sources.items() if _is_held(source)}
    inputs = [node for node in placeholders if node not in names]
    position = {node: place for place, node in enumerate(graph.nodes)}
    return CapturedGraph(
        graph=graph,
        inputs=inputs,
        tensors=tensors,
        names=names,
        learned=frozenset(node for node in names if isinstance(tensors[node], nn.Parameter)),
        position=position,
        root=_calls(graph, inputs, position),
        uncast=[],
        sizes=SizeRecord(),
        training_dropout=lambda call, scale: 0.0,  # eval mode is all that was compiled
    )


def _constants(traced: fx.GraphModule) -> dict[Node, Tensor]:
    """Tensors that the code writes out, as further placeholders, with their values."""
    graph, found = traced.graph, {}
    *_, last = graph.find_nodes(op="placeholder")
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(traced, node.target)
        with graph.inserting_after(last):
            last = graph.placeholder(node.target)
        last.meta = node.meta
        found[last] = value
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return found


def _require_operators(graph: fx.Graph) -> None:
    """Raises:
    CaptureError: something is called that is no operator on values, such as a switch of autocast.
    """
    called = (node.target for node in graph.nodes if node.op == "call_function")
    other = next((each for each in called if not isinstance(each, OpOverload) and each is not operator.getitem), None)
    if other is not None:
        raise CaptureError(
            f"the graph calls {getattr(other, '__name__', other)}, which is no operator on values; compile the parts "
            "of the model that change no autocast or gradient mode"
        )


def _is_held(source: Source) -> bool:
    """Whether a value is a module's, and no input of the call."""
    guard = source.guard_source
    return guard.is_unspecialized_nn_module() or guard.is_unspecialized_builtin_nn_module()


def _path(source: Source) -> Iterator[str]:
    """The names that lead to it, below the module that is compiled."""
    if isinstance(source, ChainedSource):
        yield from _path(source.base)
    if isinstance(source, DictGetItemSource):
        yield str(source.index)
    elif isinstance(source, AttrSource) and source.member not in _CONTAINERS:
        yield source.member


def _calls(graph: fx.Graph, inputs: list[Node], position: dict[Node, int]) -> ModuleCall:
    """The tree of module calls, by what the nodes say."""
    root = ModuleCall("", "", 0, {node.name: NodeRef(node) for node in inputs}, exit=len(position))
    open_calls: list[tuple[str, ModuleCall]] = [("", root)]
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {}) if node.op == "call_function" else {}
        shared = 0
        while shared < min(len(stack), len(open_calls) - 1) and open_calls[shared + 1][0] == list(stack)[shared]:
            shared += 1
        for _, call in open_calls[shared + 1 :]:
            call.exit = position[node]
        del open_calls[shared + 1 :]
        for key, (path, kind) in list(stack.items())[shared:]:
            parent = open_calls[-1][1]
            call = ModuleCall(path.partition(".")[2], class_name(kind), position[node], {}, parent=parent)
            parent.children.append(call)
            open_calls.append((key, call))
    (result,) = graph.find_nodes(op="output")
    root.output = tree_map(lambda leaf: NodeRef(leaf) if isinstance(leaf, Node) else leaf, result.args[0])
    given = {node for node in position if node.op == "call_function"} | set(inputs)
    for call in (each for each in root.walk() if each is not root):
        _bound(call, [node for node, place in position.items() if call.encloses(place)], given)
    return root


def _bound(call: ModuleCall, inside: list[Node], given: set[Node]) -> None:
    """State what goes into a call and what comes out: values from before, and those that are used behind it."""
    own = set(inside)
    before = dict.fromkeys(used for node in inside for used in node.all_input_nodes if used in given - own)
    behind = [NodeRef(node) for node in inside if any(user not in own for user in node.users)]
    call.arguments = {node.name: NodeRef(node) for node in before}
    call.output = behind[0] if len(behind) == 1 else tuple(behind)
