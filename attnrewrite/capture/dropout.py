"""The dropout rate on attention weights, where eval mode passes it as zero: only a call in training mode shows it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .module_call import ModuleCall, NodeRef
from .replica import replica


class TrainingDropout:
    """``training_dropout`` of a model's modules, asked once for a call: a loop may make hundreds of sites of one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rates: dict[tuple[int, float], float] = {}

    def __call__(self, call: ModuleCall, scale: float) -> float:
        key = id(call), scale  # the capture that asks keeps its calls
        if key not in self._rates:
            self._rates[key] = training_dropout(self.model.get_submodule(call.path), call, scale)
        return self._rates[key]


def training_dropout(module: nn.Module, call: ModuleCall, scale: float) -> float:
    """The largest rate on attention weights that ``module`` uses in training; 0 if it does not run on its own, as it
    was called.

    ``scale`` is that of its dot products: a number that the module holds and that is no rate.
    """
    if not _may_drop(module, scale):
        return 0.0
    module = replica(module, training=True, own_buffers=True)
    with FakeTensorMode(allow_non_fake_inputs=True), _RateRecorder() as recorder, torch.no_grad():
        arguments = tree_map(_stand_in, call.arguments)
        bound = inspect.BoundArguments(inspect.signature(module.forward), OrderedDict(arguments))
        try:
            module.forward(*bound.args, **bound.kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            return 0.0
    return recorder.rate


class _RateRecorder(TorchDispatchMode):
    """Sees the rate of a fused attention, and of a dropout on values of a softmax's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        self.weights: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        schema = func._schema.arguments  # arguments that equal their default are not passed
        given = {argument.name: argument.default_value for argument in schema}
        given |= dict(zip(given, args, strict=False)) | kwargs
        if given.get("dropout_p") is not None:
            self.rate = max(self.rate, float(given["dropout_p"]))
        if name == "aten::bernoulli_" and isinstance(given.get("p"), float) and args[0].shape in self.weights:
            self.rate = max(self.rate, 1.0 - given["p"])
        if name == "aten::native_dropout" and args[0].shape in self.weights:
            self.rate = max(self.rate, float(given["p"]))
        result = func(*args, **kwargs)
        if name in ("aten::_softmax", "aten::_safe_softmax"):
            self.weights.add(result.shape)
        return result


def _may_drop(module: nn.Module, scale: float) -> bool:
    """Some number in the module could be a rate (an epsilon is smaller); a cheap test that spares most the call."""
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules()):
        return True
    numbers = (v for child in module.modules() for v in child.__dict__.values() if type(v) is float)
    return any(1e-3 < v < 1.0 and v != scale for v in numbers)


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, NodeRef) or leaf.node is None:
        return leaf
    value: Tensor = leaf.node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)
