"""Options of the attention targets: what is no option's value is an error that names it."""

from __future__ import annotations

from typing import Any

import pytest

from attnrewrite.errors import ArgumentError
from attnrewrite.planning.registry import target_of


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("aggregated", {"window_size": 4}, r"window_size: must be odd .* got 4"),
        ("aggregated", {"window_size": 0}, r"window_size: must be odd and at least 1, got 0"),
        ("aggregated", {"window_size": 3.0}, r"window_size: .* got 3\.0"),
        ("aggregated", {"window_size": (3, 3)}, r"window_size: .* got \(3, 3\)"),
        ("aggregated", {"pool": 0}, r"pool: must be at least 1"),
        ("aggregated", {"pool": (2, -1)}, r"pool: must be at least 1, got \(2, -1\)"),
        ("aggregated", {"pool": "2"}, r"pool: expected an integer or two of them, got '2'"),
        ("aggregated", {"pool": (2, 2, 2)}, r"pool: expected an integer or two"),
        ("aggregated", {"local_bias": float("nan")}, r"local_bias: expected a number or -inf, got nan"),
        ("aggregated", {"local_bias": "off"}, r"local_bias: expected a number or -inf, got 'off'"),
        ("aggregated", {"local_bias": float("inf")}, r"local_bias: expected a number or -inf, got inf"),
        ("aggregated", {"local_bias": [0.0]}, r"local_bias: expected a number or -inf, got \[0\.0\]"),
        ("aggregated", {"kernel_size": 3}, r"does not take \['kernel_size'\]; it takes: window_size, pool, local_bias"),
        ("aggregated", {"windows": "keep"}, r"windows: expected 'pool' or 'mask', got 'keep'"),
        ("aggregated", {"windows": "mask", "pool": 2}, r"windows: 'mask' does not pool .*pool and local_bias out"),
        ("manhattan", {"decay": 0}, r"decay: expected None, 'official' or a number in \(0, 1\], got 0"),
        ("manhattan", {"decay": 1.5}, r"decay: .* got 1\.5"),
        ("manhattan", {"decay": True}, r"decay: .* got True"),
        ("manhattan", {"decay": float("nan")}, r"decay: .* got nan"),
        ("manhattan", {"decay": "offical"}, r"decay: .* got 'offical'"),
        ("manhattan", {"placement": "before"}, r"placement: expected 'inside' or 'outside', got 'before'"),
        ("manhattan", {"reduced_keys": "drop"}, r"reduced_keys: expected 'refuse' or 'keep' or 'refit', got 'drop'"),
        ("neighborhood", {"reduced_keys": "refuse"}, r"reduced_keys: expected 'keep' or 'refit', got 'refuse'"),
        ("long_short_distance", {"reduced_keys": "keep"}, r"reduced_keys: expected 'refuse' or 'refit', got 'keep'"),
        ("manhattan_decomposed", {"decay": -0.5}, r"decay: .* got -0\.5"),
        ("manhattan_decomposed", {"placement": "inside"}, r"does not take \['placement'\]"),
        ("long_short_distance", {"group_size": 0}, r"group_size: must be at least 1"),
        ("long_short_distance", {"group_size": 2.5}, r"group_size: expected an integer"),
        ("long_short_distance", {"interval": (0, 1)}, r"interval: must be at least 1, got \(0, 1\)"),
        ("long_short_distance", {"shifted": "drop"}, r"shifted: expected 'keep' or 'long', got 'drop'"),
        ("neighborhood", {"kernel_size": -1}, r"kernel_size: must be at least 1"),
        ("neighborhood", {"dilation": 0}, r"dilation: must be at least 1"),
        ("neighborhood", {"oversize": "pad"}, r"oversize: expected 'clamp' or 'error', got 'pad'"),
        ("dilated_neighborhood", {"kernel_size": (3, 0)}, r"kernel_size: must be at least 1"),
        ("dilated_neighborhood", {"dilation": "2"}, r"dilation: expected an integer"),
    ],
)
def test_wrong_values_are_named(target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        target_of(target, options)
