"""What the stages of RMT (Fan et al., CVPR 2024) are built of; maps are channels-last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conv_ffn import ConvFFN
from .decay import ManhattanPosition, PositionTables, log_decay, rotary_angles
from .depthwise import DepthwiseConv
from .drop_path import DropPath
from .manhattan import ManhattanAttention

NORM_EPS = 1e-6


class ConvStem(nn.Module):
    """Four 3 x 3 convolutions with batch norm and GELU between: an image to a map of a quarter of its sides."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        steps = [(in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1)]
        layers: list[nn.Module] = []
        for channels, out, stride in steps:
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, H / 4, W / 4, dim]``, odd sides rounded up at each halving."""
        return self.proj(image).permute(0, 2, 3, 1)


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2, and batch norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H / 2, W / 2, out_dim]``, odd sides rounded up."""
        return self.norm(self.reduction(source.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class StagePosition(ManhattanPosition):
    """The position of one stage, with the buffers that official weights hold.

    The tables come from the formula, not from the buffers, which a cast model or a half precision file rounds.
    """

    def __init__(self, head_dim: int, num_heads: int, initial_decay: float, decay_range: float, rotary: str) -> None:
        super().__init__(head_dim, num_heads, initial_decay, decay_range, rotary)
        self.angle: Tensor
        self.decay: Tensor
        self.register_buffer("angle", rotary_angles(head_dim, torch.float32).repeat_interleave(2))
        self.register_buffer("decay", log_decay(num_heads, initial_decay, decay_range, torch.float32))

    def agrees(self, decay: Tensor) -> bool:
        """Whether stored decays are this stage's, up to rounding to half precision; other shapes are not judged."""
        own = log_decay(self.num_heads, self.initial_decay, self.decay_range, torch.float64, decay.device)
        return decay.is_meta or decay.shape != own.shape or torch.allclose(decay.double(), own, rtol=1e-2, atol=0)


class ManhattanBlock(nn.Module):
    """Conditional position by a depthwise 3 x 3 convolution, then pre-norm attention and feed-forward network.

    Args:
        attention: at the width ``dim``.
        hidden_dim: of the feed-forward network.
        ffn_conv: whether that has its depthwise convolution.
        layer_scale: initial factor of both residual branches; None leaves the factors out.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attention: ManhattanAttention,
        hidden_dim: int,
        ffn_conv: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.retention_layer_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.retention = attention
        self.drop_path = DropPath(drop_path)
        self.final_layer_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = ConvFFN(dim, hidden_dim, ffn_conv)
        self.pos = DepthwiseConv(dim, 3)
        self.gamma_1, self.gamma_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((1, 1, 1, dim), layer_scale)) for _ in range(2)
        )

    def forward(self, source: Tensor, tables: PositionTables | None = None) -> Tensor:
        """``[B, H, W, dim]`` to the same shape; ``tables`` as in ``ManhattanAttention``."""
        source = source + self.pos(source)
        source = source + self._branch(self.retention(self.retention_layer_norm(source), tables), self.gamma_1)
        return source + self._branch(self.ffn(self.final_layer_norm(source)), self.gamma_2)

    def _branch(self, branch: Tensor, factor: Tensor | None) -> Tensor:
        return self.drop_path(branch if factor is None else branch * factor)
