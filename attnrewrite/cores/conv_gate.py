"""The activation of an MLP as that of a convolutional gated linear unit (Shi 2024, TransNeXt, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ir.core import StageCore
from ..ir.sites import Grid
from ..modules.depthwise import DepthwiseConv
from ..numerics.activations import ACTIVATIONS
from ..operators.conv_glu import check_activation
from .sequence import grid_of, join_map, split_map


class ConvGate(StageCore):
    """``activation(conv(hidden)) * value(source)``, which starts as ``activation(hidden)``.

    The convolution starts as the identity, 3 x 3 depthwise, and the value as one everywhere; both train from there on.
    Prefix tokens are maps of one pixel: the center of the convolution acts on them.

    Args:
        activation: name of the activation.
        hidden_dim: channels of ``hidden``.
        source_dim: channels of ``source``; None leaves the value out, for an MLP that has its own gate.
        convolves: False leaves the convolution out, for an MLP that has its own.
        grid: where the convolution finds the map in token sequences; None if it is given maps.
        pre_activation: name of what acts before the convolution, as in PVT v2's linear variant.
    """

    def __init__(
        self,
        activation: str,
        hidden_dim: int,
        source_dim: int | None,
        convolves: bool,
        grid: Grid | None,
        pre_activation: str = "identity",
    ) -> None:
        super().__init__()
        self.grid = grid
        check_activation("activation", activation)
        check_activation("pre_activation", pre_activation)
        self.activation, self.pre_activation = activation, pre_activation
        self.conv = identity_convolution(hidden_dim) if convolves else None
        self.takes_source = source_dim is not None
        self.value = None if source_dim is None else constant_one(source_dim, hidden_dim)

    def forward(self, hidden: Tensor, gate: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """``[batch, tokens, hidden_dim]`` or ``[batch, height, width, hidden_dim]`` in, the same out.

        ``gate`` is the value of an MLP that has one; ``source`` what feeds the MLP's first linear map.
        """
        value = gate if self.value is None else self.value(source)
        assert isinstance(value, Tensor)
        names = (self.activation, self.pre_activation)
        if self.conv is None:
            return ACTIVATIONS[names[0]](ACTIVATIONS[names[1]](hidden)) * value
        gated = self.conv.gated
        return on_map(lambda *parts: gated(parts[0], parts[1], *names), self.grid, hidden, value)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pre_activation={self.pre_activation!r}, grid={self.grid}"


class ConvGatedMlp(nn.Module):
    """``fc2(gate(fc1(source)))`` with a ``ConvGate``: a whole MLP of another width.

    Args:
        dim, hidden_dim, out_dim: channels.
        activation, grid, pre_activation: of the ``ConvGate``.
        dropout: rate before ``fc2``.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int,
        activation: str,
        grid: Grid | None,
        pre_activation: str = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.gate = ConvGate(activation, hidden_dim, dim, True, grid, pre_activation)
        self.grid = grid
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[batch, tokens, dim]`` or ``[batch, height, width, dim]`` to the same with ``out_dim`` channels."""
        return self.fc2(self.drop(self.hidden(source)))

    def hidden(self, source: Tensor) -> Tensor:
        """What ``fc2`` is given."""
        return self.gate(self.fc1(source), source=source)


def on_map(operator: Callable[..., Tensor], grid: Grid | None, *values: Tensor) -> Tensor:
    """``operator`` of channels-last maps on maps, or on ``[prefix, map]`` tokens of ``grid`` or of its aspect ratio.

    A prefix token is a map of one pixel.
    """
    if grid is None:
        return operator(*values)
    grid = grid_of(values[0].shape[1], grid)
    prefixes, images = zip(*(split_map(value, grid) for value in values), strict=True)
    image = operator(*images)
    if not grid.prefix_tokens:
        return join_map(prefixes[0], image)
    pixels = operator(*(prefix.flatten(0, 1)[:, None, None] for prefix in prefixes))
    return join_map(pixels[:, 0, 0].unflatten(0, prefixes[0].shape[:2]), image)


def identity_convolution(channels: int) -> DepthwiseConv:
    """A 3 x 3 depthwise convolution that starts as the identity."""
    made = DepthwiseConv(channels, 3)
    with torch.no_grad():
        nn.init.zeros_(made.conv.weight)[:, :, 1, 1] = 1.0
        nn.init.zeros_(made.conv.bias)  # type: ignore[arg-type]  # it has one
    return made


def constant_one(dim: int, out_dim: int) -> nn.Linear:
    """A linear map whose result is one whatever it is given."""
    made = nn.Linear(dim, out_dim)
    nn.init.zeros_(made.weight)
    nn.init.ones_(made.bias)
    return made
