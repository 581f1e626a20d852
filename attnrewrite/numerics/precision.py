"""In which precision attention is computed, and what autocast makes of its operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on; as everywhere in torch it leaves float64 alone."""
    dtype = autocast_dtype(next(tensor for tensor in tensors if tensor is not None).device.type)
    if dtype is None:
        return tensors
    return tuple(tensor if tensor is None or tensor.dtype is torch.float64 else tensor.to(dtype) for tensor in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off, or unknown as on the meta device."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[None]:
    """For what keeps its own precision; devices without autocast (meta) refuse to be asked."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
