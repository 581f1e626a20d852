"""Every operator by its public function, of one map and of a parameter that gradients reach too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_cases import random
from torch import Tensor

from attnrewrite.functional import (
    axial_attention,
    biased_attention,
    conv_glu,
    grouped_attention,
    local_attention,
    neighborhood_attention,
    soft_split,
)


@dataclass(frozen=True)
class Call:
    """``function(x, parameter)``, of a map ``x`` of some shape whose height and width are its ``axes``."""

    function: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
    parameter: tuple[int, ...]
    shape: tuple[int, ...] = (2, 7, 8, 2, 4)
    axes: tuple[int, int] = (1, 2)

    def arguments(self, batch: int = 2, taller: int = 0, wider: int = 0) -> tuple[Tensor, Tensor]:
        """Random ones, of a larger map if asked."""
        shape = [batch, *self.shape[1:]]
        for axis, more in zip(self.axes, (taller, wider), strict=True):
            shape[axis] += more
        return random(*shape), random(*self.parameter)

    def __call__(self, x: Tensor, parameter: Tensor) -> tuple[Tensor, ...]:
        found = self.function(x, parameter)
        return found if isinstance(found, tuple) else (found,)


def _neighborhood(x, bias):
    return neighborhood_attention(x, x, x, 3, dilation=(1, 2), bias=bias, return_lse=True)


def _strided(x, bias):
    return local_attention(
        x, x, x, (3, 4), boundary="clamp", stride=2, offset=(0, 1), is_causal=(True, False), bias=bias
    )


def _masked(x, bias):
    keys, values = x[:, 0], x[:, -1]
    return local_attention(
        x, x, x, 3, boundary="mask", bias=bias, additional_keys=keys, additional_values=values, return_lse=True
    )


def _grouped(x, bias):
    pads = {"pad_key": x[0, 0, 0], "pad_value": x[0, 0, 1]}
    return grouped_attention(x, x, x, 3, 1, bias=bias, **pads, return_lse=True)


def _interleaved(x, bias):
    return grouped_attention(x, x, x, 3, 2, bias=bias, interval=(2, 1))


def _rolled(x, bias):
    return grouped_attention(x, x, x, 3, 1, bias=bias, rolled=True)


def _biased(x, log_decay):
    tokens, sides = x.flatten(1, 2), (x.shape[1], x.shape[2])
    return biased_attention(tokens, tokens, tokens, sides, log_decay=log_decay, return_lse=True)


def _axial(x, log_decay):
    return axial_attention(x, x, x, 1, log_decay=log_decay, return_lse=True)


def _conv_glu(x, weight):
    return conv_glu(x, weight, None, x, pre_activation="silu")


def _soft_split(x, weight):
    return soft_split(x, weight, None, 3, 2, 1)


def _normalized_soft_split(x, weight):
    return soft_split(x, weight, None, 3, 2, 1, norm_weight=weight[0], norm_bias=weight[1], eps=1e-2)


CALLS = {
    "neighborhood": Call(_neighborhood, (2, 5, 5)),
    "strided": Call(_strided, (2, 5, 7)),
    "masked": Call(_masked, (2, 3, 3)),
    "grouped": Call(_grouped, (2, 9, 9)),
    "interleaved": Call(_interleaved, (2, 9, 9)),
    "rolled": Call(_rolled, (2, 9, 9)),
    "biased": Call(_biased, (2,)),
    "axial": Call(_axial, (2,)),
    "conv_glu": Call(_conv_glu, (4, 1, 3, 3), (2, 7, 8, 4)),
    "soft_split": Call(_soft_split, (5, 27), (2, 3, 7, 8), (2, 3)),
    "normalized soft_split": Call(_normalized_soft_split, (5, 27), (2, 3, 7, 8), (2, 3)),
}


class Called(torch.nn.Module):
    """A call as a module, its parameter learned."""

    def __init__(self, call: Call, parameter: Tensor) -> None:
        super().__init__()
        self.call, self.parameter = call, torch.nn.Parameter(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.call(x, self.parameter)
