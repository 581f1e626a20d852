"""Models around the attentions that users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Case
from zoo.map_mixers import Axial, MapAttention, Unfolded, Windows
from zoo.token_mixers import (
    HEADS,
    SIDE,
    WIDTH,
    AcrossSamples,
    ChannelAttention,
    ContentMasked,
    Einsum,
    KeyValuePacked,
    Masked,
    MaximumSubtracted,
    MultiQuery,
    Packed,
    Pooled,
    Selected,
    SoftmaxOverQueries,
    Torch,
    Transposed,
)

Mixer = Callable[[], nn.Module]


class Block(nn.Module):
    """A residual block around a token mixer."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), mixer
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Patches, blocks, mean, logits. ``prefix`` and ``suffix`` tokens surround the patches."""

    def __init__(self, *blocks: nn.Module, prefix: int = 1, suffix: int = 0, sequence_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.first = nn.Parameter(torch.randn(1, prefix, WIDTH))
        self.last = nn.Parameter(torch.randn(1, suffix, WIDTH))
        self.position = nn.Parameter(torch.randn(1, prefix + SIDE * SIDE + suffix, WIDTH))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, 10)
        self.sequence_first = sequence_first

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        first, last = (extra.expand(x.shape[0], -1, -1) for extra in (self.first, self.last))
        x = torch.cat([first, x, last], dim=1) + self.position
        if self.sequence_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(0 if self.sequence_first else 1))


class MapClassifier(nn.Module):
    """The same on a channels-first map, without extra tokens."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixers, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.ModuleList(mixers), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x.mean((2, 3)))


class Reused(nn.Module):
    """One block called twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, activation="gelu", **options)


def handwritten_cases() -> list[Case]:
    def tied() -> nn.Module:
        block = Block(Packed())
        return Classifier(block, block)

    def tokens(mixer: Mixer, **options: Any) -> Callable[[], nn.Module]:
        return lambda: Classifier(Block(mixer()), Block(mixer()), **options)

    def maps(*mixers: Mixer) -> Callable[[], nn.Module]:
        return lambda: MapClassifier(*(mixer() for mixer in mixers))

    builders: dict[str, Callable[[], nn.Module]] = {
        "packed 3·h·d": tokens(Packed),
        "packed h·3·d": tokens(lambda: Packed("h3d")),
        "packed (h d 3)": tokens(lambda: Packed("hd3")),
        "scale on k": tokens(lambda: Packed(scale="k")),
        "scores divided": tokens(lambda: Packed(scale="division")),
        "maximum subtracted": tokens(MaximumSubtracted),
        "softmax by hand": tokens(lambda: Packed(stable=True)),
        "talking heads": tokens(lambda: Packed(talking=True)),
        "einsum": tokens(Einsum),
        "key and value packed": tokens(KeyValuePacked),
        "multi-query": tokens(MultiQuery),
        "MultiheadAttention batch first": tokens(lambda: Torch(True)),
        "MultiheadAttention batch first, no weights": tokens(lambda: Torch(True, False)),
        "MultiheadAttention sequence first": tokens(lambda: Torch(False, False), sequence_first=True),
        "MultiheadAttention sequence first, misused": tokens(lambda: Torch(False)),
        "MultiheadAttention batch first, misused": tokens(lambda: Torch(True), sequence_first=True),
        "sequence first, turned round": tokens(lambda: Transposed(Torch(False, False))),
        "attention over [N, B, C]": tokens(lambda: Transposed(Packed())),
        "attention over [N, B, C] from [N, B, C]": tokens(lambda: Transposed(Packed()), sequence_first=True),
        "TransformerEncoderLayer": lambda: Classifier(encoder_layer(batch_first=True), encoder_layer(batch_first=True)),
        "TransformerEncoderLayer norm first": lambda: Classifier(encoder_layer(batch_first=True, norm_first=True)),
        "TransformerEncoderLayer sequence first": lambda: Classifier(encoder_layer(), sequence_first=True),
        "TransformerEncoder": lambda: Classifier(
            nn.TransformerEncoder(encoder_layer(batch_first=True), 2, enable_nested_tensor=False)
        ),
        "TransformerEncoderLayer misused": lambda: Classifier(encoder_layer()),
        "masked_fill": tokens(lambda: Masked("fill")),
        "boolean mask": tokens(lambda: Masked("boolean")),
        "additive mask": tokens(lambda: Masked("additive")),
        "causal": tokens(lambda: Masked("causal")),
        "mask from the input": tokens(ContentMasked),
        "across samples": tokens(AcrossSamples),
        "softmax over queries": tokens(SoftmaxOverQueries),
        "channel attention": tokens(ChannelAttention),
        "best keys only": tokens(Selected),
        "pooled keys": tokens(Pooled),
        "no prefix": tokens(Packed, prefix=0),
        "suffix tokens": tokens(Packed, prefix=0, suffix=3),
        "prefix and suffix": tokens(Packed, prefix=2, suffix=1),
        "tied blocks": tied,
        "block called twice": lambda: Classifier(Reused(Block(Packed()))),
        "tied attention in two blocks": lambda: Classifier(*(Block(mixer) for mixer in [Packed()] * 2)),
        "map attention": maps(MapAttention, MapAttention),
        "windows": maps(Windows, lambda: Windows(shift=2)),
        "windows, convolutions": maps(lambda: Windows(linear=False)),
        "unfold windows": maps(lambda: Unfolded(4)),
        "unfold with halo": maps(lambda: Unfolded(4, 1)),
        "axial": maps(Axial),
    }
    return [Case(f"handwritten:{name}", build, (3, 8 * SIDE, 8 * SIDE)) for name, build in builders.items()]
