"""Every way to call the attention functions wrongly is answered with what is wrong."""

from __future__ import annotations

import pytest
import torch

from attnrewrite.errors import ArgumentError
from attnrewrite.functional import (
    axial_attention,
    biased_attention,
    conv_glu,
    grouped_attention,
    local_attention,
    neighborhood_attention,
    soft_split,
)

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
        ({"boundary": "wrap"}, "boundary must be one of clamp, mask, got 'wrap'"),
        ({"boundary": "mask", "is_causal": True}, "is_causal needs boundary 'clamp' on axis 0"),
        ({"stride": 2, "offset": 2}, r"offset 2 lies outside 0 \.\. 1 on axis 0: .* use 0"),
        ({"boundary": "mask", "bias": torch.zeros(3, 5, 5)}, r"bias has shape \(3, 5, 5\), expected \(3, 3, 3\)"),
        ({"additional_bias": torch.zeros(1)}, "additional_bias is given without additional_keys"),
        ({"place_bias": torch.zeros(4)}, r"place_bias has shape \(4,\), expected what broadcasts to \(3, 8, 9, 9\)"),
        ({"post": torch.zeros(2, 8, 9, 3, 4)}, r"post has shape \(2, 8, 9, 3, 4\), expected \(2, 8, 9, 3, 9\)"),
        ({"query": X.repeat(1, 1, 1, 2, 1)[..., :4, :]}, "query has 4 heads, key or value 3: they must divide"),
    ],
)
def test_windows_around_queries_that_do_not_fit(changes, message):
    with pytest.raises(ArgumentError, match=message):
        local_attention(**maps(**{"kernel_size": 3, "boundary": "clamp", **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"shift": 3}, r"shift 3 lies outside 0 \.\. 2 on axis 0"),
        ({"shift": (1, 1, 1)}, "shift has 3 entries for a 2-D map"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"interval": 2, "rolled": True}, r"rolled: only windows are rolled, got interval \(2, 2\)"),
        ({"additional_keys": X[:, 0]}, "additional_keys is given without additional_values"),
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


T = torch.randn(2, 13, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": (3, 5)}, r"query has shape \(2, 13, 3, 4\), expected \[B, 16, heads, channels\]"),
        ({"query": T[0]}, "query has shape"),
        ({"query": T.long()}, "query is torch.int64: attention needs a floating dtype"),
        ({"key_sides": (2, 2)}, r"key has shape .*, expected \[B, 5, heads, channels\]"),
        ({"key": T[..., :2]}, r"key has shape \(2, 13, 3, 2\), expected \(2, 13, 3, 4\)"),
        ({"value": T[:1]}, r"value has shape \(1, 13, 3, 4\), expected \(2, 13, 3, 4\)"),
        ({"log_decay": torch.zeros(2)}, r"log_decay has shape \(2,\), expected \(3,\)"),
        ({"log_decay": torch.zeros(3).half()}, "log_decay is torch.float16: .* use float32 or float64"),
        ({"log_decay": torch.zeros(3, device="meta")}, "log_decay is on meta, but query on cpu"),
        ({"table": torch.zeros(3, 5, 5)}, r"table has shape \(3, 5, 5\), expected \(3, 5, 7\)"),
        (
            {"key": T[:, :5], "value": T[:, :5], "key_sides": (2, 2), "table": torch.zeros(3, 5, 7)},
            "table: has no entries for a coarser map",
        ),
    ],
)
def test_sequences_that_do_not_fit(changes, message):
    arguments = {"query": T, "key": T, "value": T, "sides": (3, 4), "prefix_tokens": 1, **changes}
    with pytest.raises(ArgumentError, match=message):
        biased_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": 2}, r"axis must be 0 \(along columns\) or 1 \(along rows\), got 2"),
        ({"query": X[:, 0], "key": X[:, 0], "value": X[:, 0]}, r"expected \[B, H, W, heads, head_dim\]"),
        ({"log_decay": torch.zeros(3).bfloat16()}, "log_decay is torch.bfloat16"),
    ],
)
def test_lines_that_do_not_fit(changes, message):
    with pytest.raises(ArgumentError, match=message):
        axial_attention(**maps(**{"axis": 1, **changes}))


G = torch.randn(2, 5, 6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelo"}, "activation: unknown 'gelo'.*did you mean 'gelu'"),
        ({"pre_activation": "rely"}, "pre_activation: unknown 'rely'.*did you mean 'relu'"),
        ({"gate": G[0]}, r"gate: must be a floating \[B, H, W, channels\], got torch.float32 \(5, 6, 4\)"),
        ({"gate": G.long()}, "gate: must be a floating"),
        ({"weight": torch.zeros(4, 1, 2, 2)}, "weight: filters must be odd, so that they have a center, got 2 x 2"),
        ({"weight": torch.zeros(3, 1, 3, 3)}, r"weight has shape \(3, 1, 3, 3\), expected \(4, 1, 3, 3\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"value": G[:1]}, "value has shape"),
        ({"value": G.double()}, "value is torch.float64, but gate is torch.float32"),
    ],
)
def test_gates_that_do_not_fit(changes, message):
    with pytest.raises(ArgumentError, match=message):
        conv_glu(**{"gate": G, "weight": torch.zeros(4, 1, 3, 3), **changes})


IMAGE, W = torch.randn(2, 3, 8, 9), torch.zeros(5, 27)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE[0]}, r"image: must be a floating \[B, C, H, W\], got torch.float32 \(3, 8, 9\)"),
        ({"stride": 0}, "kernel_size, stride, padding: must be at least 1, 1 and 0, got 3, 0 and 1"),
        ({"padding": -1}, "must be at least 1, 1 and 0, got 3, 2 and -1"),
        ({"kernel_size": 2}, r"weight has shape \(5, 27\), expected \(5, 12\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(5,\)"),
        ({"norm_weight": torch.zeros(27)}, "norm_weight is given without norm_bias"),
        ({"norm_weight": torch.zeros(9), "norm_bias": torch.zeros(27)}, r"norm_weight has shape \(9,\)"),
        ({"weight": W.double()}, "weight is torch.float64, but image is torch.float32"),
    ],
)
def test_patches_that_do_not_fit(changes, message):
    arguments = {"image": IMAGE, "weight": W, "bias": None, "kernel_size": 3, "stride": 2, "padding": 1, **changes}
    with pytest.raises(ArgumentError, match=message):
        soft_split(**arguments)


def _size(function):
    return "kernel_size" if function is neighborhood_attention else "window_size"
