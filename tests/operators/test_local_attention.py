"""Local attention: tiles of any size against the reference, and identities."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_same, local_problem, local_problems, of_dtype, on, random, results
from attnrewrite.backends.tiled import blocks, cheapest_tile
from attnrewrite.backends.tiled.cost import Work
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attnrewrite.functional import grouped_attention, local_attention, neighborhood_attention
from attnrewrite.operators.backend import Request
from attnrewrite.operators.dispatch import refusals
from attnrewrite.operators.index_rule import AxisRule

BACKENDS = ["plain", "reference", "tiled"]


TILED_RUNS = [1, 3000, 1 << 22]
"""Bytes of a run of tiles: one tile, some, all."""


def tiled_problems():
    """Random ones that tiles serve."""
    return local_problems().filter(lambda problem: refusals(Request.of(problem, needs_gradient=True))["tiled"] is None)


@settings(max_examples=40, deadline=None)
@given(tiled_problems(), st.tuples(*[st.integers(1, 8)] * 3), st.sampled_from(TILED_RUNS))
def test_any_tiling_is_the_reference(problem, tile, run_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "attnrewrite.backends.tiled.cheapest_tile", lambda rules, work: (tile[: len(rules)], 0.0)
        )
        patch.setitem(blocks.RUN_BYTES, "cpu", run_bytes)
        tiled = results(on("tiled"), problem)
    assert_same(tiled, results(on("reference"), problem))


def test_large_map_in_every_direction():
    problem = local_problem(
        (45, 50), (7, 5), stride=(1, 2), dilation=(2, 1), is_causal=(False, True), scale=0.2, batch=2, bias=True,
        additional=3,
    )  # fmt: skip
    assert_same(results(on("tiled"), problem), results(on("reference"), problem))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(backend, causal):
    problem = local_problem(
        (5, 4), (3, 2), stride=(2, 1), dilation=(1, 2), is_causal=(causal, False), scale=0.7, heads=1, dim=2, bias=True,
        additional=1,
    )  # fmt: skip
    leaves = [operand.requires_grad_() for operand in problem.operands[:6]]
    assert torch.autograd.gradcheck(
        lambda *operands: on(backend)(problem.with_operands([*operands, None, None, None])), leaves
    )


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
    problem = local_problem((3, 3), (3, 3), additional=2, value_dim=3)
    query, key, value, _, more_keys, more_values, *_ = problem.operands
    joined = neighborhood_attention(
        query, key, value, 3, additional_keys=more_keys, additional_values=more_values, backend=backend
    )
    keys = torch.cat([key.flatten(1, 2), more_keys], dim=1)
    values = torch.cat([value.flatten(1, 2), more_values], dim=1)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query.flatten(1, 2), keys, values)))
    assert_same([joined.flatten(1, 2).transpose(1, 2)], [dense])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_averages(backend):
    query, key, value, *_ = local_problem((6,), (6,)).operands
    output = neighborhood_attention(query, key, value, 6, scale=0.0, backend=backend)
    assert_same([output], [value.mean(1, keepdim=True).expand_as(output)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    query, key, value, *_ = of_dtype(local_problem((9, 9), (3, 3)), torch.float32).operands
    output, lse = neighborhood_attention(query * 1e3, key * 1e3, value, 3, backend=backend, return_lse=True)
    assert output.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dim", [3, 2])  # as wide as queries or not
def test_a_window_without_any_key_is_nan_and_leaves_the_others_alone(backend, value_dim):
    problem = local_problem((9, 8), (3, 3), batch=2, value_dim=value_dim, bias=True)
    bias = problem.bias
    bias[0, 1:4, 1:4] = -torch.inf  # head 0: all an interior query sees
    bias[1, 2:, 2:] = -torch.inf  # head 1: all that the first query sees, and some keys of others
    output, lse, *gradients = results(on(backend), problem)
    dead = torch.zeros(2, 9, 8, 2, dtype=torch.bool)
    dead[:, 1:-1, 1:-1, 0] = True
    dead[:, 0, 0, 1] = True
    assert output.isnan().equal(dead[..., None].expand_as(output))
    assert lse.eq(-torch.inf).equal(dead)
    expected = results(on("reference"), problem)
    assert_same([output.nan_to_num()], [expected[0].nan_to_num()])
    for one, other in zip(gradients, expected[2:], strict=True):  # NaN may reach all keys of a tile
        assert one.isnan()[other.isnan()].all()
        assert_same([one.nan_to_num()], [other.masked_fill(one.isnan(), 0.0)])


def test_gradients_that_arrive_at_the_statistics_alone_are_the_reference():
    operands = local_problem((9, 8), (3, 3), batch=2, value_dim=3).operands[:3]

    def gradients(backend):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        _, lse = neighborhood_attention(*leaves, 3, backend=backend, return_lse=True)
        return torch.autograd.grad(lse.sin().sum(), leaves)

    assert_same(gradients("tiled"), gradients("reference"))


@pytest.mark.parametrize("additional", [0, 2])
def test_gradients_of_the_output_alone_are_the_reference(additional):
    """As in most models: what torch's fused kernel serves."""
    problem = local_problem((19, 18), (5, 3), batch=2, value_dim=3, additional=additional)
    leaves = [x.detach().requires_grad_() for x in problem.operands if x is not None]

    def gradients(backend):
        extra = dict(zip(("additional_keys", "additional_values"), leaves[3:], strict=False))
        output = neighborhood_attention(*leaves[:3], (5, 3), dilation=2, backend=backend, **extra)
        return torch.autograd.grad(output.sin().sum(), leaves)

    assert_same(gradients("tiled"), gradients("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_no_special_case(backend):
    output, _, *gradients = results(on(backend), local_problem((6, 6), (3, 3), batch=0, bias=True))
    assert output.shape == (0, 6, 6, 2, 2)
    assert gradients[3].eq(0).all()


def test_small_maps_are_one_tile_and_large_ones_are_not():
    work = Work("cpu", images_and_heads=4, channels=64)
    assert cheapest_tile((AxisRule(7, 7), AxisRule(7, 7)), work)[0] == (7, 7)
    tile, _ = cheapest_tile((AxisRule(56, 7), AxisRule(56, 7)), work)
    assert max(tile) < 28


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_blocks_with_an_offset_are_shifted_windows(backend):
    maps = [random(1, 8, 7, 2, 4) for _ in range(3)]
    blocks_of_map = local_attention(
        *maps, (4, 3), boundary="mask", stride=(4, 3), offset=(2, 1), backend=backend, return_lse=True
    )
    assert_same(blocks_of_map, grouped_attention(*maps, (4, 3), (2, 1), backend=backend, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_window_twice_as_large_as_the_map_is_dense_attention(backend):
    query, key, value = (random(2, 3, 4, 2, 5) for _ in range(3))
    dense = scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)))
    output = local_attention(query, key, value, (5, 7), boundary="mask", backend=backend)
    assert_same([output.flatten(1, 2).transpose(1, 2)], [dense])


def test_a_place_bias_of_minus_infinity_hides_a_place():
    maps = [random(1, 6, 6, 2, 4) for _ in range(3)]
    hidden = torch.zeros(9, dtype=torch.float64)
    hidden[[0, 1, 2, 6, 7, 8]] = -torch.inf  # all but the middle row of the window
    output = local_attention(*maps, 3, boundary="mask", place_bias=hidden, return_lse=True)
    assert_same(output, local_attention(*maps, (1, 3), boundary="mask", return_lse=True))


def test_what_is_added_after_the_softmax_weighs_values():
    """A window out of the softmax by its bias: only the weights that are added see it, and those on the map only."""
    query, key, value = (random(1, 5, 4, 2, 3) for _ in range(3))
    keys = random(1, 2, 2, 3)
    post, infinite = random(1, 5, 4, 2, 9), torch.full((2, 3, 3), -torch.inf, dtype=torch.float64)
    found = local_attention(
        query, key, value, 3, boundary="mask", bias=infinite, additional_keys=keys, additional_values=keys, post=post
    )
    shared = neighborhood_attention(
        query, key, torch.zeros_like(value), 1, additional_keys=keys, additional_values=keys,
        bias=torch.full((2, 1, 1), -torch.inf, dtype=torch.float64),
    )  # fmt: skip
    unfolded = torch.nn.functional.pad(value, (0, 0, 0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2)
    assert_same([found], [shared + torch.einsum("byxhp,byxhdp->byxhd", post, unfolded)])


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_of_fewer_heads_serve_consecutive_ones(heads):
    query, key, value = random(1, 5, 5, 4, 3), random(1, 5, 5, heads, 3), random(1, 5, 5, heads, 3)
    spread = [part.repeat_interleave(4 // heads, dim=3) for part in (key, value)]
    assert_same([neighborhood_attention(query, key, value, 3)], [neighborhood_attention(query, *spread, 3)])
