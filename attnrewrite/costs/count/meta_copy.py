"""A copy of a model on the meta device: its structure without its numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...reports.conversion import ConversionReport
from ...rewrite.rewritten import Rewriting, RewrittenModule

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHARED = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, type, Rewriting, ConversionReport)
"""What a copy may share: a rewriting is code, which is given the module."""


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors, registered or not, have shapes and no storage. ``model`` is only read.

    Hooks are left out, as what they do need not be known by shapes.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for tensor in _tensors(modules):
        if id(tensor) not in memo:
            memo[id(tensor)] = on_meta(tensor)
    if any(_copies_itself(type(module)) for module in modules):
        memo |= {id(hooks): type(hooks)() for module in modules for hooks in (vars(module)[name] for name in _HOOKS)}
        return _in_eval_mode(copy.deepcopy(model, memo))
    memo |= {id(module): module.__class__.__new__(module.__class__) for module in modules}
    for module in modules:
        state = {name: _copied(name, value, memo) for name, value in vars(module).items()}
        memo[id(module)].__setstate__(state)
    return _in_eval_mode(memo[id(model)])


def _in_eval_mode(model: nn.Module) -> nn.Module:
    model.eval()  # whatever that returns: some models forget to
    return model


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same layout without storage; a parameter stays one."""
    if tensor.is_meta and not isinstance(tensor, nn.Parameter):
        return tensor.detach()
    empty = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Everything that modules hold, in containers and beside the registered ones too."""
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield value
            elif name in ("_parameters", "_buffers"):
                yield from (tensor for tensor in value.values() if tensor is not None)
            elif name != "_modules" and isinstance(value, dict | list | tuple) and value:
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """As ``copy.deepcopy`` does, which takes ten times as long over what needs no copy."""
    if isinstance(value, _SHARED):
        return value
    if name in _HOOKS:
        return type(value)()
    if name in ("_parameters", "_buffers", "_modules"):
        return {key: None if part is None else memo[id(part)] for key, part in value.items()}
    if isinstance(value, dict | set | list) and not value:
        return type(value)() if type(value) in (dict, set, list) else copy.copy(value)
    return copy.deepcopy(value, memo)


def _copies_itself(kind: type) -> bool:
    """Whether a class has its own way of being copied; that of rewritten modules only finds their class again."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__")
    classes = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    classes = [base for base in classes if not issubclass(base, RewrittenModule)]
    return any(vars(base).get(name) for base in classes for name in own)
