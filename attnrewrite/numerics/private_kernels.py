"""The one way to torch's private attention kernels, which trust their caller where public operators check.

Their names begin with an underscore. They step over the rows of an operand by its row stride, but take the numbers of a
row one after another, whatever the last stride says, and they divide by sizes. What is laid out otherwise gives wrong
numbers and reads outside the operand, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError


def private_kernel(name: str, *arguments: Any, **options: Any) -> Any:
    """Call ``aten::{name}`` with every tensor among its arguments laid out as these kernels take for granted.

    That is, for tensors ``[..., rows, channels]`` of any dtype: the numbers of a row are neighbors in memory, and rows
    do not overlap (BLAS asks that of a matrix; a row stride of 0 is what ``expand`` gives). Leading axes may have any
    stride, and any offset will do: the kernels load without alignment. A tensor that is laid out otherwise is copied,
    others are not; nor are tensors on the meta device, which have no memory to read.

    Raises:
        BackendError: for a tensor with an axis of size 0; some of these kernels kill the process for one.
    """
    kernel = getattr(torch.ops.aten, name)
    established = [_packed(argument, name) for argument in arguments]
    return kernel(*established, **{option: _packed(value, name) for option, value in options.items()})


def _packed(argument: Any, kernel: str) -> Any:
    """A tensor as it is or as a copy of the layout that is needed; anything else as it is."""
    if not isinstance(argument, Tensor) or argument.is_meta:
        return argument
    if not argument.numel():
        raise BackendError(f"aten::{kernel} takes no empty tensor, got one of shape {tuple(argument.shape)}")
    (rows, channels), (row, channel) = argument.shape[-2:], argument.stride()[-2:]
    neighbors, apart = channels == 1 or channel == 1, rows == 1 or row >= channels
    return argument if neighbors and apart else argument.contiguous()
