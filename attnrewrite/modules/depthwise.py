"""Depthwise convolution of channels-last maps, alone and as the gate of what else a layer has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeGuard

from torch import Tensor, nn

from ..functional import conv_glu
from ..numerics.activations import ACTIVATIONS


class ChannelsLastConv(ABC, nn.Module):
    """A depthwise convolution of ``[B, H, W, channels]``, stride 1, zero padded, under whatever name."""

    @property
    @abstractmethod
    def filters(self) -> nn.Module:
        """The convolution."""

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, channels]`` to the same shape."""
        conv = self.filters
        if _is_bare(conv):
            return conv_glu(source, conv.weight, conv.bias, activation="identity")
        return conv(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def gated(self, gate: Tensor, value: Tensor, activation: str, pre_activation: str) -> Tensor:
        """``activation(self(pre_activation(gate))) * value`` of ``[B, H, W, channels]``; see ``functional.conv_glu``.

        One operator does it all, unless hooks or adapters were put on the layer or on its convolution: they take part.
        """
        conv = self.filters
        if _is_bare(conv) and not _is_hooked(self):
            return conv_glu(gate, conv.weight, conv.bias, value, activation=activation, pre_activation=pre_activation)
        return ACTIVATIONS[activation](self(ACTIVATIONS[pre_activation](gate))) * value


class DepthwiseConv(ChannelsLastConv):
    """One ``kernel_size`` x ``kernel_size`` filter a channel, with bias."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    @property
    def filters(self) -> nn.Module:
        return self.conv


def _is_bare(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution is torch's, so that its weights say all that it does."""
    return type(conv) is nn.Conv2d and not _is_hooked(conv)


def _is_hooked(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its class's forward."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" in vars(layer) or any(hooks)
