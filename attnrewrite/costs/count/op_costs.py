"""The price of one ATen call, from shapes alone.

Contractions are priced by the formulas that torch and this library register for ``FlopCounterMode``, and by those
below for the products that torch leaves out. An operation that is in no table here is not free: it is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ...algebra.site_formula import BATCH_NORM, LAYER_NORM
from ...operators.attention_problem import AttentionProblem
from ...operators.operator import REGISTERED
from .cost import Cost


def name_of(operator: Any) -> str:
    """``softmax`` for any overload of ``aten::_softmax``; ``namespace::name`` for others' operators."""
    namespace, _, name = operator._schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace}::{name}"


def contraction_macs(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """Multiply-accumulates of a contraction; None for an operator that is none."""
    if name_of(operator) == "convolution_backward":
        return _convolution_backward(args)
    formula = flop_registry.get(operator._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result)) // 2
    own = _PRODUCTS.get(name_of(operator))
    return None if own is None else own(args, result)


def _convolution_backward(args: tuple[Any, ...]) -> int:
    """A forward pass for each gradient that is asked for; torch's own formula overcharges grouped convolutions."""
    gradient, image, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return (image if transposed else gradient).numel() * weight[0].numel() * sum(wanted[:2])


def price(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Cost | None:
    """What the call costs, ``saved`` left out; None if the operator's price is not known."""
    read, written = _traffic(operator, args, kwargs, result)
    macs = contraction_macs(operator, args, kwargs, result)
    name = name_of(operator)
    if macs is not None:
        own = REGISTERED.get(name)
        if own is not None:
            problem = own.problem_of(args)
            pairs = problem.pairs() if isinstance(problem, AttentionProblem) else 0
            return Cost(macs, problem.elementwise(), 0, read, written, 0, pairs)
        attention = _fused_map(name, args)
        return Cost(macs, _SOFTMAX * attention, 0, read, written, 0, attention)
    if name in _FREE or name in _BACKWARD or getattr(operator, "is_view", False):
        return Cost(bytes_read=read, bytes_written=written)
    elements = _elements(result)
    if name in _NORMS:
        weight, fvcore = _NORMS[name]
        return Cost(0, weight * elements, fvcore * elements, read, written)
    if name in _SOFTMAXES:
        return Cost(0, _SOFTMAX * elements, 0, read, written, 0, elements)
    if name in _ACTIVATIONS:
        return Cost(0, _ACTIVATIONS[name] * elements, 0, read, written)
    if name in _POOLS:
        return Cost(0, _inputs(args), _inputs(args), read, written)
    if name in _REDUCTIONS:
        return Cost(0, _inputs(args), 0, read, written)
    if torch.Tag.pointwise in operator.tags or name in _POINTWISE:
        return Cost(0, elements, 0, read, written)
    return None


def _traffic(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """Bytes read and written: none by a view, none for storage that is only reserved."""
    if name_of(operator) in _RESERVING:
        return 0, 0
    operands, results = tensors_of((args, kwargs)), tensors_of(result)
    storages = {storage_key(tensor) for tensor in operands}
    if not operator._schema.is_mutable:
        results = [tensor for tensor in results if storage_key(tensor) not in storages]
    if not results:
        return 0, 0
    return sum(map(_bytes, operands)), sum(map(_bytes, results))


def storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """What a tensor holds; a broadcast axis (stride 0) is held once."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor.numel() * tensor.element_size()
    return math.prod(side for side, stride in zip(tensor.shape, strides, strict=True) if stride) * tensor.element_size()


def _fused_map(name: str, args: tuple[Any, ...]) -> int:
    """Elements of the attention map that a fused forward operator of torch's never stores."""
    if name not in _FUSED_DENSE:
        return 0
    query, key = args[0], args[1]
    return math.prod(query.shape[:-1]) * key.shape[-2]


def tensors_of(tree: Any) -> list[Tensor]:
    """Of an operator's arguments or results, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree for tensor in tensors_of(part)]


def _elements(result: Any) -> int:
    return max((tensor.numel() for tensor in tensors_of(result)), default=0)


def _inputs(args: tuple[Any, ...]) -> int:
    return max((tensor.numel() for tensor in tensors_of(args)), default=0)


_PRODUCTS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "mv": lambda args, result: args[0].numel(),
    "addmv": lambda args, result: args[1].numel(),
    "dot": lambda args, result: args[0].numel(),
    "vdot": lambda args, result: args[0].numel(),
    "addbmm": lambda args, result: args[1].numel() * args[2].shape[-1],
    "addr": lambda args, result: result.numel(),
    "_cdist_forward": lambda args, result: result.numel() * args[0].shape[-1],
    "_int_mm": lambda args, result: args[0].numel() * args[1].shape[-1],
    "_trilinear": lambda args, result: max(tensor.numel() for tensor in tensors_of(args)),
}

_SOFTMAX = 5  # maximum, difference, exponential, sum, quotient
_SOFTMAXES = {"_softmax", "_safe_softmax", "_log_softmax"}

_NORMS = {
    "native_layer_norm": (7, LAYER_NORM),
    "native_group_norm": (7, LAYER_NORM),
    "_fused_rms_norm": (4, 0),
    "native_batch_norm": (2, BATCH_NORM),
    "_native_batch_norm_legit": (2, BATCH_NORM),
    "_native_batch_norm_legit_no_training": (2, BATCH_NORM),
    "_batch_norm_no_update": (2, BATCH_NORM),
    "_batch_norm_with_update": (2, BATCH_NORM),
}
"""Operations an element, and what fvcore charges for one."""

_ACTIVATIONS = {"gelu": 5, "silu": 3, "hardswish": 4, "mish": 5, "elu": 3, "softplus": 3, "log_sigmoid_forward": 3}

_POINTWISE = {"floor_divide", "fmod", "remainder", "true_divide"}
"""Pointwise operators that torch does not tag as such."""

_POOLS = {
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
}  # fmt: skip

_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "norm", "linalg_vector_norm",
    "prod", "cumsum", "argmax", "argmin", "topk", "sort", "logsumexp", "avg_pool2d", "max_pool2d_with_indices", "any",
    "all", "bincount", "unique2", "_unique2", "grid_sampler_2d", "_fft_r2c", "_fft_c2r", "_fft_c2c",
}  # fmt: skip

_RESERVING = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "lift_fresh", "detach",
    "alias", "set_", "resize_", "as_strided_",
}  # fmt: skip

_FREE = _RESERVING | {
    "zeros", "ones", "full", "arange", "linspace", "eye", "zeros_like", "ones_like", "full_like", "new_zeros",
    "new_ones", "new_full", "scalar_tensor", "zero_", "fill_", "fill", "rand", "randn", "rand_like", "randn_like",
    "bernoulli", "bernoulli_", "uniform_", "normal_", "native_dropout", "copy_", "copy", "clone", "_to_copy",
    "contiguous", "cat", "stack", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "flip", "repeat",
    "index", "index_select", "index_put", "index_put_", "gather", "scatter", "scatter_", "select_scatter",
    "slice_scatter", "masked_fill", "masked_fill_", "where", "tril", "triu", "im2col", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "_unsafe_view", "_reshape_copy", "_reshape_alias", "embedding", "unfold",
    "_unsafe_index", "repeat_interleave", "take", "nonzero", "tril_indices", "triu_indices", "rot90", "one_hot",
    "_local_scalar_dense", "view_as_complex", "view_as_real", "complex", "polar", "_assert_async",
    "_assert_tensor_metadata", "split_with_sizes_copy", "_fused_sdp_choice", "is_same_size", "equal", "sym_size",
}  # fmt: skip
"""Moves and makes values, computes none: bytes, but no operations."""

_BACKWARD = {
    "native_layer_norm_backward", "native_group_norm_backward", "native_batch_norm_backward",
    "batch_norm_backward", "_softmax_backward_data", "_log_softmax_backward_data", "gelu_backward", "silu_backward",
    "native_dropout_backward", "slice_backward", "select_backward", "_adaptive_avg_pool2d_backward", "col2im",
    "embedding_dense_backward", "constant_pad_nd_backward", "upsample_bicubic2d_backward", "unfold_backward",
    "upsample_bilinear2d_backward", "avg_pool2d_backward", "max_pool2d_with_indices_backward", "hardswish_backward",
    "_fused_rms_norm_backward", "index_backward", "value_selecting_reduction_backward", "scatter_add",
    "scatter_add_", "index_add", "index_add_", "_cdist_backward",
}  # fmt: skip
"""Elementwise work of the backward pass, which is priced by its bytes alone."""

_FUSED_DENSE = {
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip
