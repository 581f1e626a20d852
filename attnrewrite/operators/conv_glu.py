"""The operator ``attnrewrite::conv_glu``: a depthwise convolution of a map, with what gates it.

``activation(DWConv(pre_activation(gate))) * value`` is the gate of a convolutional gated linear unit (Shi 2024,
TransNeXt, section 3.3). Gate and value are linear maps of the same tokens; the projection that follows is no part of
the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, nearest
from ..numerics.activations import ACTIVATIONS, OPERATIONS
from .checks import check_shape
from .operator import Operator
from .problem import Problem


@dataclass(frozen=True)
class ConvGluProblem(Problem):
    """One call, of channels-last maps.

    Attributes:
        gate: ``[B, H, W, channels]``, which is convolved.
        weight: ``[channels, 1, kernel_size, kernel_size]``, one odd filter a channel; the map is zero padded.
        bias: ``[channels]``, of the convolution.
        value: like ``gate``; None multiplies by nothing.
        activation, pre_activation: names of what acts behind the convolution and before it (PVT v2's linear variant).
    """

    name = "conv_glu"
    results = ("output",)
    records_plain = True
    gate: Tensor
    weight: Tensor
    bias: Tensor | None
    value: Tensor | None
    activation: str
    pre_activation: str

    def check(self) -> None:
        check_activation("activation", self.activation)
        check_activation("pre_activation", self.pre_activation)
        if self.gate.dim() != 4 or not self.gate.is_floating_point():
            raise ArgumentError(
                f"gate: must be a floating [B, H, W, channels], got {self.gate.dtype} {tuple(self.gate.shape)}"
            )
        channels, side = self.gate.shape[-1], self.weight.shape[-1]
        check_shape("weight", self.weight, (channels, 1, side, side))
        if side % 2 == 0:
            raise ArgumentError(f"weight: filters must be odd, so that they have a center, got {side} x {side}")
        check_shape("bias", self.bias, (channels,))
        check_shape("value", self.value, tuple(self.gate.shape))
        self.check_alike()

    def empty_results(self) -> tuple[Tensor]:
        return (self.gate.new_empty(self.gate.shape),)

    def macs(self) -> int:
        """The convolution's."""
        return self.weight.shape[-1] ** 2 * self._numbers()

    def backward_macs(self) -> int:
        """The convolution again, its transpose, and the gradient of its weight."""
        return 3 * self.macs()

    def elementwise(self) -> int:
        """Both activations, and the product with the value."""
        names = (self.activation, self.pre_activation)
        each = sum(OPERATIONS.get(name, 1) for name in names if name != "identity")
        return (each + (self.value is not None)) * self._numbers()

    def plain(self) -> tuple[Tensor]:
        hidden = ACTIVATIONS[self.pre_activation](self.gate).permute(0, 3, 1, 2)
        side = self.weight.shape[-1]
        convolved = F.conv2d(hidden, self.weight, self.bias, padding=side // 2, groups=self.weight.shape[0])
        gated = ACTIVATIONS[self.activation](convolved.permute(0, 2, 3, 1))
        return (gated if self.value is None else gated * self.value,)

    def _numbers(self) -> int:
        batch, height, width, channels = self.gate.shape
        return batch * height * width * channels


def check_activation(argument: str, name: str) -> None:
    """Raises:
    ArgumentError: there is no activation of that name.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"{argument}: unknown {name!r}{nearest(name, ACTIVATIONS)}; known are {known}")


CONV_GLU = Operator(ConvGluProblem)
