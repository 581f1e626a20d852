"""Every way to call the attention functions wrongly is answered with what is wrong."""

from __future__ import annotations

import pytest
import torch

from attnrewrite.errors import ArgumentError
from attnrewrite.functional import grouped_attention, neighborhood_attention

X = torch.randn(2, 8, 9, 3, 4)


def maps(**changes):
    return {"query": X, "key": X, "value": X, **changes}


@pytest.mark.parametrize("function", [neighborhood_attention, grouped_attention])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": X[0, 0]}, "query has 3 dimensions, expected .*1 to 3 axes"),
        ({"query": X[None, None]}, "query has 7 dimensions"),
        ({"query": X.long()}, "query is torch.int64: attention needs a floating dtype"),
        ({"key": X[..., :2]}, r"key has shape \(2, 8, 9, 3, 2\), expected \(2, 8, 9, 3, 4\)"),
        ({"value": X[:, :5]}, r"value has shape \(2, 5, 9, 3, 4\), expected \(2, 8, 9, 3, 4\)"),
        ({"key": X.double()}, "key is torch.float64, but query is torch.float32"),
        ({"value": X.to("meta")}, "value is on meta, but query on cpu"),
        ({"bias": torch.zeros(3, 5, 5).double()}, "bias is torch.float64, but query"),
        ({"bias": torch.zeros(3, 5, 4)}, r"bias has shape \(3, 5, 4\), expected \(3, (5, 5|9, 9)\)"),
    ],
)
def test_maps_that_do_not_fit(function, changes, message):
    with pytest.raises(ArgumentError, match=message):
        function(**maps(**changes), **{_size(function): 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kernel_size": 9},
            "kernel_size 9 x dilation 1 exceeds the 8 tokens of axis 0: use a kernel_size of at most 8",
        ),
        ({"dilation": (1, 4)}, "kernel_size 3 x dilation 4 exceeds the 9 tokens of axis 1"),
        ({"stride": 4}, "stride 4 exceeds kernel_size 3"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size has 3 entries for a 2-D map"),
        ({"is_causal": (True,)}, "is_causal has 1 entries for a 2-D map"),
        (
            {"additional_keys": X[:, 0]},
            "additional_keys is given without additional_values: give both or neither",
        ),
        ({"additional_values": X[:, 0]}, "additional_values is given without additional_keys"),
        (
            {"additional_keys": X, "additional_values": X},
            r"additional_keys has shape \(2, 8, 9, 3, 4\), expected \(2, 1, 3, 4\)",
        ),
        (
            {"additional_keys": X[:, 0], "additional_values": X[:, 0, :5]},
            r"additional_values has shape \(2, 5, 3, 4\), expected \(2, 9, 3, 4\)",
        ),
    ],
)
def test_neighborhoods_that_do_not_fit(changes, message):
    with pytest.raises(ArgumentError, match=message):
        neighborhood_attention(**maps(**{"kernel_size": 3, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"shift": 3}, r"shift 3 lies outside 0 \.\. 2 on axis 0"),
        ({"shift": (1, 1, 1)}, "shift has 3 entries for a 2-D map"),
        ({"pad_key": X[0, 0, 0]}, "pad_key is given without pad_value"),
        (
            {"pad_key": X[0, 0, 0, :2], "pad_value": X[0, 0, 0]},
            r"pad_key has shape \(2, 4\), expected \(3, 4\)",
        ),
        (
            {"pad_key": X[0, 0, 0], "pad_value": X[0, 0, 0, 0]},
            r"pad_value has shape \(4,\), expected \(3, 4\)",
        ),
    ],
)
def test_windows_that_do_not_fit(changes, message):
    with pytest.raises(ArgumentError, match=message):
        grouped_attention(**maps(**{"window_size": 3, **changes}))


def _size(function):
    return "kernel_size" if function is neighborhood_attention else "window_size"
