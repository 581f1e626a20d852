"""Convolutional gated linear unit (Shi 2024, TransNeXt, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from ..operators.conv_glu import check_activation
from .depthwise import ChannelsLastConv
from .initialization import initialize


class GateConv(ChannelsLastConv):
    """Depthwise 3 x 3 convolution under its official name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    @property
    def filters(self) -> nn.Module:
        return self.dwconv


class ConvGLU(nn.Module):
    """``fc2(activation(DWConv3x3(gate)) * value)`` with ``gate, value = fc1(x)``, for maps of any size.

    Tokens that lie on no map are maps of one pixel: the convolution's center acts on them.

    Args:
        dim: channels in.
        hidden_dim: channels of gate and value each; ``gated_width`` gives the official one.
        out_dim: channels out; None is ``dim``.
        activation: name of the gate's activation.
        pre_activation: name of what acts before the convolution, as in PVT v2's linear variant.
        dropout: rate before and after ``fc2``.

    Raises:
        ArgumentError: for an unknown activation or a width below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int | None = None,
        *,
        activation: str = "gelu",
        pre_activation: str = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ArgumentError(f"hidden_dim: must be at least 1, got {hidden_dim}")
        check_activation("activation", activation)
        check_activation("pre_activation", pre_activation)
        self.activation, self.pre_activation = activation, pre_activation
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.dwconv = GateConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.drop = nn.Dropout(dropout)
        self.apply(initialize)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H, W, out_dim]``."""
        gate, value = self.fc1(source).chunk(2, dim=-1)
        hidden = self.dwconv.gated(gate, value, self.activation, self.pre_activation)
        return self.drop(self.fc2(self.drop(hidden)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pre_activation={self.pre_activation!r}"


def gated_width(hidden_dim: int) -> int:
    """Two thirds, with which a gated unit has as many weights as an MLP of ``hidden_dim`` (Shazeer 2020)."""
    return int(2 * hidden_dim / 3)
