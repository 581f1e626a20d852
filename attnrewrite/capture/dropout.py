"""The dropout rate of a fused attention: in eval mode it is passed as zero; only a call in training mode shows it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .boundaries import ModuleCall, NodeRef
from .snapshot import untouched


def fused_dropout(call: ModuleCall) -> float:
    """The largest rate that the module passes to fused attention in training; 0 if it does not run on its own."""
    if not _may_drop(call.module):
        return 0.0
    with (
        untouched(call.module),
        FakeTensorMode(allow_non_fake_inputs=True),
        _RateRecorder() as recorder,
        torch.no_grad(),
    ):
        call.module.train()
        arguments = tree_map(_stand_in, call.arguments)
        bound = inspect.BoundArguments(inspect.signature(call.module.forward), OrderedDict(arguments))
        try:
            call.module.forward(*bound.args, **bound.kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            return 0.0
    return recorder.rate


class _RateRecorder(TorchFunctionMode):
    rate = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            rate = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            self.rate = max(self.rate, float(rate))
        return func(*args, **kwargs)


def _may_drop(module: nn.Module) -> bool:
    """Some number in the module could be a rate; a cheap test that spares most models the call."""
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules()):
        return True
    return any(type(v) is float and 0.0 < v < 1.0 for child in module.modules() for v in child.__dict__.values())


def _stand_in(leaf: Any) -> Any:
    if not isinstance(leaf, NodeRef) or leaf.node is None:
        return leaf
    value: Tensor = leaf.node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)
