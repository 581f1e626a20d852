"""The gate of a convolutional gated linear unit, ``activation(DWConv(gate)) * value`` (Shi 2024, TransNeXt, section
3.3).

Gate and value are linear maps of the same tokens; the projection that follows is no part of the operator. The function
here is the meaning: plain torch operations, for any device, layout and floating dtype, of any order of differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ArgumentError, nearest
from ..numerics.activations import ACTIVATIONS

Convolution = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ConvGluGeometry:
    """What of a call is no tensor.

    Attributes:
        activation: name of the gate's activation.
        pre_activation: name of what acts before the convolution, as in PVT v2's linear variant.
        kernel_size: side of the depthwise convolution in tokens, odd; stride 1, zero padded to the same map.
    """

    activation: str = "gelu"
    pre_activation: str = "identity"
    kernel_size: int = 3

    def macs(self, tokens: int, hidden_dim: int) -> int:
        """Multiply-accumulates of so many tokens: the convolution's. Arguments may be symbols of whole numbers."""
        return self.kernel_size**2 * tokens * hidden_dim


def conv_glu(gate: Tensor, value: Tensor, convolve: Convolution | None, geometry: ConvGluGeometry) -> Tensor:
    """Gate the value.

    Args:
        gate, value: ``[B, H, W, hidden_dim]``, or token sequences where ``convolve`` finds the map in them.
        convolve: the depthwise convolution of ``[B, H, W, hidden_dim]``; None: the gate is convolved already. It is a
            layer rather than its weights, so that hooks and adapters that were put on it take part.
        geometry: activations and size.

    Returns:
        A tensor like ``value``.

    Raises:
        ArgumentError: for an unknown activation.
    """
    check_activation("activation", geometry.activation)
    check_activation("pre_activation", geometry.pre_activation)
    hidden = ACTIVATIONS[geometry.pre_activation](gate)
    if convolve is not None:
        hidden = convolve(hidden)
    return ACTIVATIONS[geometry.activation](hidden) * value


def check_activation(argument: str, name: str) -> None:
    """Raises:
    ArgumentError: there is no activation of that name.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"{argument}: unknown {name!r}{nearest(name, ACTIVATIONS)}; known are {known}")
