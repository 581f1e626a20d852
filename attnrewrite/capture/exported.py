"""One exported graph of a model, with its tensors and its module calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError, CaptureError, first_line
from ..numerics.draws import same_draws
from ..operators import GroupedProblem, LocalProblem
from ..operators.operator import spelled_out
from .boundaries import BoundaryRecorder, final_node, positions
from .captured_graph import CapturedGraph
from .dropout import TrainingDropout
from .examples import Inputs, normalize_inputs
from .in_place import restate_in_place
from .keywords import names_read
from .module_call import ModuleCall
from .replica import replica
from .sizes import SizeTracker

_TRACING = threading.RLock()
"""torch's exporter puts what it needs into Python's and torch's own namespaces: one trace at a time."""


@dataclass(frozen=True, eq=False)
class Capture(CapturedGraph):
    """The graph of a live ``model``, whose modules can be rewritten; ``example`` are the arguments of its call."""

    model: nn.Module
    example: Inputs

    def module_of(self, call: ModuleCall) -> nn.Module:
        """The live module that was called."""
        return self.model.get_submodule(call.path)

    @cached_property
    def keywords_read(self) -> dict[str, frozenset[str]]:
        """By the path of a module that takes any keyword argument: what its code could read, as ``is_read`` tells."""
        return names_read(self.model, self.example)


def capture(model: nn.Module, example_inputs: Any | None = None) -> Capture:
    """Export ``model`` in eval mode at the size of ``example_inputs`` and leave it untouched.

    Raises:
        ArgumentError: not a module, a wrapped module, or example inputs of the wrong shape or dtype.
        CaptureError: the model cannot be exported; the first line of the cause is kept.
    """
    _require_plain_module(model)
    args, kwargs = normalize_inputs(model, example_inputs)
    _require_finite(args, kwargs)
    try:
        return capture_call(model, (args, kwargs))
    except CaptureError:
        raise
    except Exception as cause:
        _require_runs(replica(model, training=False, own_buffers=True), args, kwargs)
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: {first_line(cause)}; make its forward free of "
            "data-dependent control flow, or convert the submodule that can be exported"
        ) from cause


RECOGNIZED_AS_CALLS = (LocalProblem, GroupedProblem)
"""Operators whose calls are sites by themselves; of others the plain form is what recognizers read."""


def traced_graph(model: nn.Module, inputs: Inputs, training: bool = False) -> Graph:
    """The graph of one call as an exporter makes it, without the boundaries of module calls."""
    args, kwargs = inputs
    with _TRACING, torch.no_grad():
        return torch.export.export(replica(model, training=training), args, kwargs, strict=False).graph


def capture_call(model: nn.Module, inputs: Inputs, training: bool = False) -> Capture:
    """Export one call of ``model``, in eval or in ``training`` mode, and leave it untouched.

    Raises:
        CaptureError: what it does is not one graph. Whatever else keeps the model from being traced is raised as it is.
    """
    args, kwargs = inputs
    traced = replica(model, training=training)
    recorder = BoundaryRecorder(model, traced)
    recorder.attach()
    tracker = SizeTracker(recorder.running)
    called = _Called(traced) if isinstance(traced, fx.GraphModule) else traced
    with _TRACING, torch.no_grad(), tracker, spelled_out(but=RECOGNIZED_AS_CALLS):
        program = torch.export.export(called, args, kwargs, strict=False)
    graph = program.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise CaptureError(
            f"{type(model).__name__} changes the autocast or gradient mode inside its forward, and what runs under "
            "it is a graph of its own; convert the submodules outside of such a region"
        )
    restate_in_place(graph)
    position = positions(iter(graph.nodes))
    tensors, names, placeholders = _placeholders(program, args, kwargs)
    # An assertion that export adds about a value says the value's position again: the first node is the value.
    final = {index: node for node, index in reversed(position.items())}
    sizes, resolved = tracker.record.resolve(lambda node: final_node(node, final))
    root = recorder.calls(final, resolved)
    parameters = {id(parameter) for parameter in model.parameters()}
    return Capture(
        graph=graph,
        inputs=placeholders,
        tensors=tensors,
        names=names,
        learned=frozenset(node for node in names if id(tensors[node]) in parameters),
        position=position,
        root=root,
        uncast=recorder.uncast,
        sizes=sizes,
        training_dropout=TrainingDropout(model),
        model=model,
        example=inputs,
    )


class _Called(nn.Module):
    """Calls a module: an exporter runs the graph of an ``fx.GraphModule`` instead, past its hooks."""

    PREFIX = "attnrewrite_called."

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attnrewrite_called = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attnrewrite_called(*args, **kwargs)


def _placeholders(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[Node, Any], dict[Node, str], list[Node]]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    examples = iter(tree_leaves((args, kwargs)))
    tensors: dict[Node, Any] = {}
    names: dict[Node, str] = {}
    inputs: list[Node] = []
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            tensors[node] = next(examples)
            inputs.append(node)
            continue
        target = spec.target
        assert target is not None, "every lifted tensor has a name"
        names[node] = target.removeprefix(_Called.PREFIX)
        if spec.kind == InputKind.CONSTANT_TENSOR or spec.persistent is False:
            tensors[node] = program.constants[target]
        else:
            tensors[node] = program.state_dict[target]
    return tensors, names, inputs


def _require_plain_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    scripted = next((path for path, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ArgumentError(
            f"model: {scripted or type(model).__name__} is a scripted or traced module of TorchScript, whose code can "
            "not be read; convert the model that it was made from, then script or trace the result"
        )
    if any(isinstance(part, fx.GraphModule) and "train" in vars(part) for part in model.modules()):
        raise ArgumentError(
            f"model: {type(model).__name__} is the module of an exported program, which holds for one mode and one way "
            "of being called; convert the model that it was made from, then export the result"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ArgumentError(
            f"model: the parameters of {type(model).__name__} are sharded; convert the model first, then wrap it"
        )
    packed = next((path for path, part in model.named_modules() if _holds_packed_weights(part)), None)
    if packed is not None:
        raise ArgumentError(
            f"model: the weights of {packed or type(model).__name__} are packed or quantized, without the values that "
            "a conversion reads and carries; convert the model first, then quantize the result"
        )
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ArgumentError(
            f"model: {type(model).__name__} is on the meta device, without values to recognize or certify anything "
            "by; build it on a real device (only attnrewrite.analyze(model, ...).total does without)"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ArgumentError(
            f"model: the parameters of {type(model).__name__} were made in inference mode, and can be neither traced "
            "nor trained outside it; build or load the model outside torch.inference_mode"
        )
    if torch.get_default_device().type == "meta":
        raise ArgumentError(
            "model: the default device is meta here, and what is computed to recognize a model would have no values; "
            "convert it outside `with torch.device('meta')`"
        )
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner = model._orig_mod if hasattr(model, "_orig_mod") else None
    if isinstance(model, wrappers) or isinstance(inner, nn.Module):
        raise ArgumentError(
            f"model: {type(model).__name__} wraps the model; convert the inner module first, then wrap the result"
        )


def _holds_packed_weights(module: nn.Module) -> bool:
    """In an object that only its own kernels read, or in a tensor that wraps others."""
    held = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
    return held or any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters(recurse=False))


def _require_finite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise ArgumentError("example_inputs: on the meta device, without values; pass a real tensor")
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise ArgumentError("example_inputs: contains NaN or infinite values; pass finite inputs")
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise ArgumentError(
                f"example_inputs: a tensor of shape {list(leaf.shape)} is empty; pass at least one sample"
            )


def _require_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a wrong example from a model that cannot be exported: only the first fails without the exporter too."""
    try:
        with torch.no_grad(), same_draws(model.parameters()):
            model(*args, **kwargs)
    except Exception as cause:
        leaves = tree_leaves((args, kwargs))
        given = ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in leaves if isinstance(leaf, Tensor))
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} does not run on them ({given or 'no tensor'}): "
            f"{first_line(cause)}; pass the shape and dtype that its forward takes"
        ) from cause


__all__ = ["Capture", "Inputs", "capture", "capture_call"]
