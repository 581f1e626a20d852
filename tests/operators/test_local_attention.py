"""Neighborhood attention: the reference against loops, the tiles against the reference, and identities."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, local_axes, local_operands, random, results
from attention_oracle import neighborhood
from attnrewrite.backends.tiled import blocks, cheapest_tile
from attnrewrite.backends.tiled.cost import Work
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attnrewrite.functional import grouped_attention, neighborhood_attention
from attnrewrite.operators import local_attention
from attnrewrite.operators.index_rule import AxisRule

BACKENDS = ["reference", "tiled"]


@st.composite
def cases(draw, longest):
    """Operands and geometry of a random call on a map of one to three axes."""
    rank = draw(st.integers(1, 3))
    grid, kernel, stride, dilation, causal = zip(
        *(draw(local_axes(longest[rank])) for _ in range(rank)), strict=True
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    operands = local_operands(
        grid,
        kernel,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        dim=draw(st.integers(1, 4)),
        value_dim=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        additional=draw(st.integers(0, 2)),
    )
    return operands, (kernel, stride, dilation, causal, draw(st.sampled_from([0.5, 1.0, 0.0])))


def on(backend, geometry):
    return lambda *tensors: local_attention(*tensors, *geometry, backend)


def oracle(geometry):
    def run(query, key, value, bias, extra_key, extra_value):
        return neighborhood(query, key, value, *geometry, bias, extra_key, extra_value)

    return run


@settings(max_examples=25, deadline=None)
@given(cases(longest={1: 9, 2: 5, 3: 3}))
def test_reference_is_the_definition(case):
    operands, geometry = case
    assert_same(results(on("reference", geometry), operands), results(oracle(geometry), operands))


@settings(max_examples=80, deadline=None)
@given(
    cases(longest={1: 40, 2: 14, 3: 7}),
    st.tuples(*[st.integers(1, 8)] * 3),
    st.sampled_from([1, 3000, 1 << 22]),
)
def test_any_tiling_is_the_reference(case, tile, run_bytes):
    operands, geometry = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "attnrewrite.backends.tiled.cheapest_tile", lambda rules, work: (tile[: len(rules)], 0.0)
        )
        patch.setitem(blocks.RUN_BYTES, "cpu", run_bytes)
        tiled = results(on("tiled", geometry), operands)
    assert_same(tiled, results(on("reference", geometry), operands))


@settings(max_examples=30, deadline=None)
@given(cases(longest={1: 60, 2: 20, 3: 7}))
def test_the_chosen_tiling_is_the_reference(case):
    operands, geometry = case
    assert_same(results(on("tiled", geometry), operands), results(on("reference", geometry), operands))


def test_large_map_in_every_direction():
    geometry = ((7, 5), (1, 2), (2, 1), (False, True), 0.2)
    operands = local_operands((45, 50), geometry[0], batch=2, bias=True, additional=3)
    assert_same(results(on("tiled", geometry), operands), results(on("reference", geometry), operands))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    operands = local_operands((5, 4), (3, 2), heads=1, dim=2, value_dim=2, bias=True, additional=1)
    function = on(backend, ((3, 2), (2, 1), (1, 2), (causal, False), 0.7))
    assert torch.autograd.gradcheck(function, [operand.requires_grad_() for operand in operands])


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_kernel_is_dense_attention(backend):
    query, key, value = (random(2, 4, 5, 3, 4) for _ in range(3))
    dense = scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)))
    output = neighborhood_attention(query, key, value, (4, 5), backend=backend)
    assert_same([output.flatten(1, 2).transpose(1, 2)], [dense])


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_equal_to_kernel_is_grouped_attention(backend):
    maps = [random(1, 6, 9, 2, 4) for _ in range(3)]
    blocked = neighborhood_attention(*maps, 3, stride=3, backend=backend, return_lse=True)
    assert_same(blocked, grouped_attention(*maps, 3, backend=backend, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dilation_splits_into_independent_groups(backend):
    maps = [random(1, 7, 8, 2, 4) for _ in range(3)]
    whole = neighborhood_attention(*maps, 2, dilation=(2, 3), backend=backend)
    for row in range(2):
        for column in range(3):
            group = [x[:, row::2, column::3] for x in maps]
            assert_same([whole[:, row::2, column::3]], [neighborhood_attention(*group, 2, backend=backend)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_additional_keys_are_joined_keys(backend):
    query, key, value, _, more_keys, more_values = local_operands((3, 3), (3, 3), additional=2, value_dim=3)
    joined = neighborhood_attention(
        query, key, value, 3, additional_keys=more_keys, additional_values=more_values, backend=backend
    )
    keys = torch.cat([key.flatten(1, 2), more_keys], dim=1)
    values = torch.cat([value.flatten(1, 2), more_values], dim=1)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query.flatten(1, 2), keys, values)))
    assert_same([joined.flatten(1, 2).transpose(1, 2)], [dense])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_averages(backend):
    query, key, value, *_ = local_operands((6,), (6,))
    output = neighborhood_attention(query, key, value, 6, scale=0.0, backend=backend)
    assert_same([output], [value.mean(1, keepdim=True).expand_as(output)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    query, key, value, *_ = (None if x is None else x.float() for x in local_operands((9, 9), (3, 3)))
    output, lse = neighborhood_attention(query * 1e3, key * 1e3, value, 3, backend=backend, return_lse=True)
    assert output.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dim", [3, 2])  # as wide as queries or not
def test_a_window_without_any_key_is_nan_and_leaves_the_others_alone(backend, value_dim):
    operands = local_operands((9, 8), (3, 3), batch=2, value_dim=value_dim, bias=True)
    bias = operands[3]
    bias[0, 1:4, 1:4] = -torch.inf  # head 0: all an interior query sees
    bias[1, 2:, 2:] = -torch.inf  # head 1: all that the first query sees, and some keys of others
    geometry = ((3, 3), (1, 1), (1, 1), (False, False), 0.5)
    output, lse, *gradients = results(on(backend, geometry), operands)
    dead = torch.zeros(2, 9, 8, 2, dtype=torch.bool)
    dead[:, 1:-1, 1:-1, 0] = True
    dead[:, 0, 0, 1] = True
    assert output.isnan().equal(dead[..., None].expand_as(output))
    assert lse.eq(-torch.inf).equal(dead)
    expected = results(on("reference", geometry), operands)
    assert_same([output.nan_to_num()], [expected[0].nan_to_num()])
    for one, other in zip(gradients, expected[2:], strict=True):  # NaN may reach all keys of a tile
        assert one.isnan()[other.isnan()].all()
        assert_same([one.nan_to_num()], [other.masked_fill(one.isnan(), 0.0)])


def test_gradients_that_arrive_at_the_statistics_alone_are_the_reference():
    operands = local_operands((9, 8), (3, 3), batch=2, value_dim=3)[:3]

    def gradients(backend):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        _, lse = neighborhood_attention(*leaves, 3, backend=backend, return_lse=True)
        return torch.autograd.grad(lse.sin().sum(), leaves)

    assert_same(gradients("tiled"), gradients("reference"))


@pytest.mark.parametrize("additional", [0, 2])
def test_gradients_of_the_output_alone_are_the_reference(additional):
    """As in most models: what torch's fused kernel serves."""
    operands = local_operands((19, 18), (5, 3), batch=2, value_dim=3, additional=additional)
    leaves = [x.detach().requires_grad_() for x in operands if x is not None]

    def gradients(backend):
        extra = dict(zip(("additional_keys", "additional_values"), leaves[3:], strict=False))
        output = neighborhood_attention(*leaves[:3], (5, 3), dilation=2, backend=backend, **extra)
        return torch.autograd.grad(output.sin().sum(), leaves)

    assert_same(gradients("tiled"), gradients("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)  # their rounding
def test_half_precision_keeps_float32_statistics(backend, dtype, tolerance):
    geometry = ((3, 3), (1, 1), (1, 1), (False, False), 0.5)
    halves = [
        x if x is None else x.to(dtype) for x in local_operands((8, 8), (3, 3), bias=True, additional=1)
    ]
    actual = results(on(backend, geometry), halves)
    expected = results(on("reference", geometry), [x.double() for x in halves])
    assert actual[1].dtype == torch.float32
    assert [x.dtype for x in actual[2:]] == [dtype] * 6
    assert_same(actual[1:2], expected[1:2], 1e-6)
    assert_same([x.double() for x in actual], expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_no_special_case(backend):
    operands = local_operands((6, 6), (3, 3), batch=0, bias=True)
    output, _, *gradients = results(on(backend, ((3, 3), (1, 1), (1, 1), (False, False), 1.0)), operands)
    assert output.shape == (0, 6, 6, 2, 2)
    assert gradients[3].eq(0).all()


def test_small_maps_are_one_tile_and_large_ones_are_not():
    work = Work("cpu", images_and_heads=4, channels=64)
    assert cheapest_tile((AxisRule(7, 7), AxisRule(7, 7)), work)[0] == (7, 7)
    tile, _ = cheapest_tile((AxisRule(56, 7), AxisRule(56, 7)), work)
    assert max(tile) < 28
