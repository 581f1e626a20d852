"""One module call as a graph of its own, in which its children are still live calls under their own names."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten, tree_flatten_with_path, tree_map

from ..capture import IN_PLACE, Capture, ModuleCall, NodeRef
from ..errors import Refusal
from ..graph.dataflow import Dataflow
from ..graph.values import argument, input_of, is_call, operator_name
from ..ir.heads import map_channels
from .editable import Editable


@dataclass(kw_only=True)
class Outlined(Editable):
    """``graph`` restates the module of ``call``, which is one of the ``donor``.

    ``restated`` are the captured nodes whose operator and arguments stand here again; ``tables`` are the shapes of the
    parameters that make biases; ``given`` are the ``leaves`` that were constants, such as masks, and their values;
    ``live`` the calls of children that stay calls; ``fixed`` what of the ``leaves`` has to stay as it was: a value, or
    a tensor's extents. Paths are below the module.
    """

    call: ModuleCall
    donor: Capture
    restated: dict[Node, Node] = field(default_factory=dict)
    leaves: list[Node] = field(default_factory=list)
    given: dict[Node, Tensor] = field(default_factory=dict)
    live: list[ModuleCall] = field(default_factory=list)
    fixed: dict[Node, Any] = field(default_factory=dict)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    handed_on: bool = False

    @property
    def module(self) -> nn.Module:
        """The live module that was called."""
        return self.donor.module_of(self.call)

    def passed_over(self) -> dict[Node, Tensor]:
        """Constants that the module is given and no longer uses."""
        return {leaf: value for leaf, value in self.given.items() if not leaf.users}

    def owns_decision(self, position: int) -> bool:
        """Whether the module's own code, or that of a child dissolved into it, ran at a trace position."""
        return self.call.encloses(position) and not any(child.encloses(position) for child in self.live)

    def relative(self, path: str) -> str:
        """The path below the module of a path below the model."""
        return path.removeprefix(f"{self.call.path}.") if self.call.path else path

    def dissolved(self) -> list[ModuleCall]:
        """Calls below the module's that are not made any more."""
        parts = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        return [
            call for call in self.call.walk() if call is not self.call and not lies_in(self.relative(call.path), parts)
        ]

    @property
    def taken(self) -> set[str]:
        return {*self.modules, *dict(self.module.named_children())}

    def guard_tables(self, bias: Node) -> None:
        """The bias is read off its parameters by position, so that they must keep their shapes."""
        pending, seen = [bias], set()
        while pending:
            node = pending.pop()
            if node.op == "get_attr" and str(node.target) not in self.constants:
                self.tables[str(node.target)] = tuple(operator.attrgetter(str(node.target))(self.module).shape)
            pending += [used for used in node.all_input_nodes if used not in seen]
            seen.update(node.all_input_nodes)


def lies_in(path: str, modules: set[str]) -> bool:
    """Whether it is the path of one of the ``modules``, or of a part of one."""
    return any(prefix in modules for prefix in itertools.accumulate(path.split("."), "{}.{}".format))


def outline(call: ModuleCall, donor: Capture, flow: Dataflow, opened: Callable[[ModuleCall], bool]) -> Outlined:
    """Restate ``call``, of a module of the ``donor``, as a graph; children for which ``opened`` holds are dissolved.

    Raises:
        Refusal: with the reason.
    """
    return _Outliner(call, donor, flow, opened).run()


class _Outliner:
    def __init__(
        self, call: ModuleCall, donor: Capture, flow: Dataflow, opened: Callable[[ModuleCall], bool]
    ) -> None:
        self.flow, self.capture, self.opened = flow, flow.capture, opened
        self.result = Outlined(graph=fx.Graph(), capture=flow.capture, call=call, donor=donor)
        self.graph = self.result.graph
        self.result.value = self._value
        self.ordered = sorted(flow.capture.position, key=flow.capture.position.__getitem__)
        self.steps = {position: node for node, position in flow.capture.position.items() if is_call(node)}
        self.attributes = _attributes(self.result.module)
        self.dropouts: dict[float, str] = {}

    def run(self) -> Outlined:
        call = self.result.call
        leaves, _ = tree_flatten(call.arguments)
        for number, leaf in enumerate(leaves):
            placeholder = self.graph.placeholder(f"argument_{number}")
            self.result.leaves.append(placeholder)
            if isinstance(leaf, NodeRef):
                self._require(leaf.node is not None, "a tensor argument was made outside the traced model")
                if leaf.node not in self.result.made:  # the same tensor given twice is one value
                    self._made(leaf.node, placeholder)  # type: ignore[arg-type]  # required above
                if leaf.node in self.flow.constants and leaf.node not in self.flow.learned:
                    self.result.given[placeholder] = self.flow.constants[leaf.node]
            else:
                placeholder.meta["value"] = leaf
        self._body(call)
        self.graph.output(tuple(self._reference(leaf) for leaf in tree_flatten(call.output)[0]))
        return self.result

    def _body(self, call: ModuleCall) -> None:
        position = call.enter
        for child in call.children:
            self._nodes(position, child.enter)
            if self.opened(child) and self._is_convolution(child):
                self._convolution(child)
            elif self.opened(child):
                self._body(child)
            else:
                self._call(child)
            position = child.exit
        self._nodes(position, call.exit)

    def _is_convolution(self, child: ModuleCall) -> bool:
        """Whether all it does is a convolution that the graph states as a linear map of channels."""
        result = child.output.node if isinstance(child.output, NodeRef) else None
        linear = None if result is None else self.flow.channel_maps.linear.get(result)
        if linear is None or child.children or not child.encloses(self.capture.position[linear]):
            return False
        given = [leaf.node for leaf in tree_flatten(child.arguments)[0] if isinstance(leaf, NodeRef)]
        return given == [input_of(input_of(linear))]

    def _convolution(self, child: ModuleCall) -> None:
        """Show the linear map that a convolution is; the convolution's own module is called for it."""
        result = child.output.node
        linear = self.flow.channel_maps.linear[result]
        operands = (self._value(input_of(linear)), self.graph.get_attr(self.result.relative(child.path)))
        rank = len(result.meta["val"].shape)
        self._made(linear, self.graph.call_function(map_channels, (*operands, rank)))
        self._node(result)

    def _nodes(self, start: int, stop: int) -> None:
        for node in self.ordered:
            if start <= self.capture.position[node] < stop and is_call(node):
                self._node(node)

    def _node(self, node: Node) -> None:
        name = operator_name(node)
        if name == "aten::_assert_tensor_metadata" or node in self.result.made:
            return
        if name == "aten::dropout" and node.args[2] is False:
            self._made(node, self._dropout(self._value(input_of(node)), float(argument(node, 1))))
            return
        if self._indexed(node):
            return
        if self.flow.adds_nothing(node) or _is_same_values(node):
            self._made(node, self._value(input_of(node)))
            return
        self._require(not self.capture.is_uncast(node), "its own code turns autocast off, which a graph does not")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        made = self.graph.call_function(self._target(node), args, kwargs)
        self.result.restated[made] = node
        self._made(node, made)

    def _indexed(self, node: Node) -> bool:
        """Restate indexing as what the model's own code wrote, whose slices a trace shows or not as they cut something
        off or not. Whether that was done."""
        position = self.capture.position.get(node)
        given = None if position is None else self.capture.sizes.given_at(position)
        if given is None or given.index is None:
            return False
        steps = [self.steps[place] for place in range(given.start, given.stop) if place in self.steps]
        chained = all(one in two.all_input_nodes and len(one.users) == 1 for one, two in itertools.pairwise(steps))
        if node is not steps[0] or not chained:
            return False
        made = self.graph.call_function(operator.getitem, (self._value(input_of(node)), given.index))
        self.result.restated[made] = steps[-1]
        self._made(steps[-1], made)
        for step in steps[:-1]:
            self.result.made[step] = self.result.made[steps[-1]]
        return True

    def _target(self, node: Node) -> Any:
        """What to call for ``node``: it writes into memory of the module's callers as it did, and into no other."""
        written, memory = node.meta.get(IN_PLACE, (None, None))
        if memory is not None and not self.result.call.encloses(self.capture.position[memory]):
            return written
        view = torch.ops.aten.view.default  # strides may differ at run time
        return torch.ops.aten.reshape.default if node.target is view else node.target

    def _dropout(self, value: Node, rate: float) -> Node:
        """The captured graph has an inactive dropout; a module makes it follow train() and eval() again."""
        if rate == 0.0:
            return value
        if rate not in self.dropouts:
            self.dropouts[rate] = self.result.add_module("dropout", nn.Dropout(rate))
        return self.graph.call_module(self.dropouts[rate], (value,))

    def _call(self, child: ModuleCall) -> None:
        self.result.live.append(child)
        module = self.result.donor.module_of(child)
        signature = inspect.signature(module.forward)
        bound = inspect.BoundArguments(signature, tree_map(self._reference, child.arguments))
        called = self.graph.call_module(self.result.relative(child.path), bound.args, bound.kwargs)
        if isinstance(child.output, NodeRef):
            if child.output.node is not None:
                self.result.handed_on |= child.output.node in self.result.made and type(module) is not nn.Identity
                self._made(child.output.node, called)
            return
        for path, leaf in tree_flatten_with_path(child.output)[0]:
            if isinstance(leaf, NodeRef) and leaf.node is not None:
                value = called
                for key in path:
                    value = self._item(value, key)
                self._made(leaf.node, value)

    def _item(self, value: Node, key: Any) -> Node:
        if isinstance(key, SequenceKey):
            return self.graph.call_function(operator.getitem, (value, key.idx))
        if isinstance(key, MappingKey):
            return self.graph.call_function(operator.getitem, (value, key.key))
        assert isinstance(key, GetAttrKey)
        return self.graph.call_function(getattr, (value, key.name))

    def _reference(self, leaf: Any) -> Any:
        if not isinstance(leaf, NodeRef):
            self._require(
                leaf is None or isinstance(leaf, str | int | float | bool | torch.dtype), f"it passes {leaf!r}"
            )
            return leaf
        self._require(leaf.node is not None, "a child is given a tensor made outside the traced model")
        return self._value(leaf.node)  # type: ignore[arg-type]  # a traced value

    def _value(self, node: Node) -> Node:
        """The value of a captured node: made before, a parameter, or a constant to be computed here as well."""
        if node in self.result.made:
            return self.result.latest(node)
        if node.op == "placeholder":
            self._made(node, self._tensor(node))
        else:
            moved = operator_name(node) == "aten::permute" and self.flow.channel_maps.moved.get(input_of(node)) is node
            self._require(moved or node in self.flow.constants, "it uses a value from outside")
            self._node(node)
        return self.result.latest(node)

    def _tensor(self, node: Node) -> Node:
        self._require(node not in self.capture.inputs, "it uses a model input that it is not given")
        value = self.capture.tensors[node]
        if id(value) in self.attributes:
            return self.graph.get_attr(self.attributes[id(value)])
        self._require(not isinstance(value, nn.Parameter), f"it uses {self.capture.names[node]}, which it does not own")
        return self.result.add_constant(value)

    def _made(self, captured: Node, value: Node) -> None:
        if "val" not in value.meta and value.op != "get_attr":
            value.meta["val"] = captured.meta["val"]
        self.result.made.setdefault(captured, []).append(value)

    def _require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Refusal(reason)


def _is_same_values(node: Node) -> bool:
    """A copy that is made or not as the memory lies: a trace shows it at one size and not at another. A slice of
    everything is an alias."""
    return operator_name(node) == "aten::alias" or (
        operator_name(node) == "aten::contiguous" and len(node.args) == 1 and not node.kwargs
    )


def _attributes(module: nn.Module) -> dict[int, str]:
    named: Iterator[tuple[str, Tensor]] = iter(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    )
    return {id(value): name for name, value in named}
