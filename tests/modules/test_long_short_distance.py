"""Long and short distance attention against attention over all tokens with keys chosen by the index rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnrewrite.errors import ArgumentError
from attnrewrite.modules.dynamic_position_bias import relative_index
from attnrewrite.modules.long_short_distance import LongShortDistanceAttention

DIM, HEADS = 32, 2


def attention(*args, **options):
    torch.manual_seed(0)
    module = LongShortDistanceAttention(DIM, HEADS, *args, **options).double()
    if module.relative_position_bias_table is not None:
        nn.init.normal_(module.relative_position_bias_table)
    return module


def by_index(module, source, group, step):
    """Every token with the keys of its region and residue, from the definition."""
    height, width = source.shape[1:3]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    steps, sizes = torch.tensor([step, step]), torch.tensor(group)
    region, inside = place // (sizes * steps), place % (sizes * steps)
    residue, slot = inside % steps, inside // steps
    same = ((region[:, None] == region) & (residue[:, None] == residue)).all(-1)
    offset = slot[:, None] - slot[None]
    bias = module.pos(offset.flatten(0, 1).double()).unflatten(0, same.shape).permute(2, 0, 1)
    query, key, value = module.qkv(source.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * module.scale + bias
    mixed = scores.masked_fill(~same, -math.inf).softmax(-1) @ value
    return module.proj(mixed.transpose(1, 2).flatten(-2)).unflatten(1, (height, width))


@given(st.integers(4, 13), st.integers(4, 13), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_masked_groups_follow_the_index_rule(height, width, rows, columns, step, long):
    module = attention((rows, columns), step if long else None)
    source = torch.randn(2, height, width, DIM, dtype=torch.float64)
    expected = by_index(module, source, (rows, columns), step if long else 1)
    torch.testing.assert_close(module(source), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("rule", "group"), [("shrink", (5, 5)), ("global", (5, 9))])
def test_a_map_that_a_group_covers(rule, group):
    module = attention(6, 2, small_map=rule)
    source = torch.randn(1, 5, 9, DIM, dtype=torch.float64)
    torch.testing.assert_close(module(source), by_index(module, source, group, 1), atol=1e-12, rtol=1e-10)


def test_a_small_map_leaves_no_trace():
    module = attention(3, 2, small_map="global")
    large = torch.randn(1, 12, 12, DIM, dtype=torch.float64)
    before = module(large)
    module(large[:, :3, :3])
    assert torch.equal(module(large), before)


def test_padding_keys_are_zero_tokens():
    padded_keys, masked = attention(4, 2, padding="keys"), attention(4, 2)
    source = torch.randn(1, 9, 10, DIM, dtype=torch.float64)
    padded = nn.functional.pad(source, (0, 0, 0, 6, 0, 7))
    torch.testing.assert_close(padded_keys(source), masked(padded)[:, :9, :10], atol=1e-12, rtol=1e-10)
    assert (padded_keys(source) - masked(source)).abs().max() > 1e-3


def test_centered_padding_moves_the_groups():
    source = torch.randn(1, 6, 6, DIM, dtype=torch.float64)
    padded = attention(4)
    shifted = padded(nn.functional.pad(source, (0, 0, 1, 1, 1, 1)))[:, 1:7, 1:7]
    padded_keys = attention(4, centered=True, padding="keys")
    torch.testing.assert_close(padded_keys(source), shifted, atol=1e-12, rtol=1e-10)


def test_the_fewest_steps_make_one_region():
    adaptive, fixed = attention(4, "adaptive"), attention(4, 3)
    source = torch.randn(1, 11, 9, DIM, dtype=torch.float64)
    assert torch.equal(adaptive(source), fixed(source))


def test_a_table_adds_to_the_network():
    both, table = attention(3, position_bias="both"), attention(3, position_bias="table")
    nn.init.zeros_(both.pos.pos3[2].weight)  # what is left is a constant a head, void in a softmax
    table.load_state_dict(both.state_dict(), strict=False)
    source = torch.randn(1, 7, 8, DIM, dtype=torch.float64)
    torch.testing.assert_close(both(source), table(source), atol=1e-12, rtol=1e-10)


def test_a_table_is_cut_to_smaller_groups_only():
    module = attention(5, position_bias="table")
    full, small = module.bias(5, 5)[0], module.bias(3, 3)[0]
    kept = [row * 5 + column for row in range(3) for column in range(3)]
    assert torch.equal(small, full[:, kept][:, :, kept])
    module.small_map = "global"
    with pytest.raises(ArgumentError, match="interpolate"):
        module(torch.randn(1, 4, 9, DIM, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_of_padding_alone_give_finite_gradients(dtype):
    module = attention(4, 8).to(dtype)
    source = torch.randn(1, 33, 33, DIM, dtype=dtype, requires_grad=True)
    output = module(source)
    output.float().square().sum().backward()
    assert output.isfinite().all()
    assert all(part.grad.isfinite().all() for part in [source, *module.parameters()])


@pytest.mark.parametrize("padding", ["mask", "keys"])
def test_gradients(padding):
    module = attention(2, 2, padding=padding)
    source = torch.randn(1, 3, 5, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, source, fast_mode=True)


@pytest.mark.parametrize("interval", [None, 2])
def test_export_for_any_batch_and_size(interval):
    module = attention(4, interval).float().eval()
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(module, (torch.randn(2, 18, 21, DIM),), dynamic_shapes=(sizes,)).module()
    for shape in [(4, 9, 14), (3, 16, 24)]:  # the exporter sets a batch of 1 apart
        source = torch.randn(*shape, DIM)
        torch.testing.assert_close(program(source), module(source), atol=1e-5, rtol=1e-5)


def test_the_state_has_parameters_only():
    names = set(attention(7, 2).state_dict())
    assert {name.split(".")[0] for name in names} == {"pos", "qkv", "proj"}


def test_offsets_are_query_minus_key():
    index = relative_index(2, 3, torch.device("cpu"))
    assert index.shape == (6, 6)
    assert index[5, 0] == 3 * 5 - 1  # one row down, two columns right: the last entry
    assert index[0, 5] == 0


def test_the_network_is_a_sixteenth_wide():
    network = LongShortDistanceAttention(96, 3, 7).pos
    assert sum(part.numel() for part in network.parameters()) == 2 * 6 + 6 + 2 * (6 * 6 + 6) + 6 * 3 + 3 + 6 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"group_size": 0}, "group_size"),
        ({"interval": 0}, "interval"),
        ({"interval": "adaptiv"}, "interval"),
        ({"position_bias": "tabel"}, "position_bias.*'table'"),
        ({"padding": "masked"}, "padding.*'mask'"),
        ({"small_map": "local"}, "small_map"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        LongShortDistanceAttention(**{"dim": DIM, "num_heads": HEADS, "group_size": 4, **options})
