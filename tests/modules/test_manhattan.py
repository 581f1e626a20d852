"""Manhattan attention against its definition, and what it must never build."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attnrewrite.backends import tiled
from attnrewrite.backends.tiled import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnrewrite.errors import ArgumentError
from attnrewrite.modules.conv_ffn import ConvFFN
from attnrewrite.modules.decay import ManhattanPosition, log_decay, rotate
from attnrewrite.modules.manhattan import ManhattanAttention
from attnrewrite.operators import AxialProblem, BiasedProblem
from attnrewrite.operators.manhattan_attention import ManhattanGeometry, map_bias
from attnrewrite.operators.manhattan_attention import manhattan_attention as operator

FORMS = pytest.mark.parametrize("decomposed", [False, True], ids=["full", "decomposed"])
PLACEMENTS = pytest.mark.parametrize("placement", ["inside", "outside"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def manhattan_attention(query, key, value, decay, *, decomposed=False, decay_placement="inside"):
    """The operator in the form that the layer would choose."""
    geometry = ManhattanGeometry(*query.shape[1:3], decomposed=decomposed, placement=decay_placement)
    return operator(query, key, value, decay, geometry)


def defined(query, key, value, decay, decomposed, placement):
    """Query by query, key by key, from the definition."""
    height, width, _, dim = query.shape[1:]

    def over(key_places, distance, y, x, source):
        keys = torch.stack([key[:, v, u] for v, u in key_places], dim=1)
        logits = torch.einsum("bhd,bkhd->bhk", query[:, y, x], keys) / math.sqrt(dim)
        bias = decay[:, None] * torch.tensor([distance(v, u) for v, u in key_places], dtype=decay.dtype)
        weights = (logits + bias).softmax(-1) if placement == "inside" else logits.softmax(-1) * bias.exp()
        return torch.einsum("bhk,bkhd->bhd", weights, torch.stack([source[:, v, u] for v, u in key_places], dim=1))

    def everywhere(at):
        return torch.stack([torch.stack([at(y, x) for x in range(width)], dim=1) for y in range(height)], dim=1)

    if not decomposed:
        places = [(v, u) for v in range(height) for u in range(width)]
        return everywhere(lambda y, x: over(places, lambda v, u: abs(v - y) + abs(u - x), y, x, value))
    rows = everywhere(lambda y, x: over([(y, u) for u in range(width)], lambda v, u: abs(u - x), y, x, value))
    return everywhere(lambda y, x: over([(v, x) for v in range(height)], lambda v, u: abs(v - y), y, x, rows))


def operands(height, width, heads, dim, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, height, width, heads, dim, generator=generator, dtype=dtype) for _ in range(3)]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 4),
    dim=st.integers(1, 6),
    decomposed=st.booleans(),
    placement=st.sampled_from(["inside", "outside"]),
    seed=st.integers(0, 99),
)
def test_any_map_as_defined(height, width, heads, dim, decomposed, placement, seed):
    query, key, value = operands(height, width, heads, dim, seed=seed)
    decay = log_decay(heads, 1, 3, torch.float64)
    found = manhattan_attention(query, key, value, decay, decomposed=decomposed, decay_placement=placement)
    expected = defined(query, key, value, decay, decomposed, placement)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@FORMS
@PLACEMENTS
def test_gradients_also_of_the_decay(decomposed, placement):
    inputs = [*operands(3, 4, 2, 3, batch=1), log_decay(2, 1, 3, torch.float64)]
    torch.autograd.gradcheck(
        lambda *parts: manhattan_attention(*parts, decomposed=decomposed, decay_placement=placement),
        [part.requires_grad_() for part in inputs],
    )


def test_rows_come_before_columns():
    query, key, value = operands(4, 5, 2, 3)
    decay = log_decay(2, 2, 4, torch.float64)
    found = manhattan_attention(query, key, value, decay, decomposed=True)
    other = manhattan_attention(*(part.transpose(1, 2) for part in (query, key, value)), decay, decomposed=True)
    assert (found - other.transpose(1, 2)).abs().max() > 1e-2


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensor(call: Callable[[], object]) -> int:
    with LargestTensor() as watch:
        call()
    return watch.elements


@pytest.mark.parametrize("wants_decay", [False, True])
def test_the_full_form_builds_nothing_of_tokens_by_tokens(wants_decay):
    height, width = 40, 56
    tokens, decay = height * width, log_decay(2, 2, 4, torch.float32)
    query, key, value = (part.flatten(1, 2) for part in operands(height, width, 2, 8, batch=1, dtype=torch.float32))
    problem = BiasedProblem(query, key, value, decay, None, (height, width), (height, width), 0, 8**-0.5)
    wanted = (True, True, True, wants_decay, False)

    def both_ways():
        results = rows.forward(problem)
        rows.backward(problem, results, (torch.ones_like(results[0]), None), wanted)

    assert largest_tensor(both_ways) < 2 * tokens**2 / 5
    assert largest_tensor(problem.plain) >= 2 * tokens**2  # the watch does see such a matrix


def test_the_decomposed_form_builds_one_bias_an_axis():
    query, key, value = operands(24, 40, 2, 8, batch=1, dtype=torch.float32)
    for axis in (0, 1):
        problem = AxialProblem(query, key, value, log_decay(2, 2, 4, torch.float32), axis, 8**-0.5)
        assert largest_tensor(lambda problem=problem: tiled.axial_attention(problem)) <= query.numel()


@FORMS
def test_no_state_depends_on_the_size(decomposed):
    attention = ManhattanAttention(32, 4, decomposed)
    attention(torch.randn(1, 9, 12, 32))
    attention(torch.randn(1, 5, 6, 32))
    assert not list(attention.buffers())
    assert sum(part.numel() for part in attention.parameters()) == 4 * (32 * 32 + 32) + 26 * 32


def test_without_decay_and_rotary_it_is_plain_attention():
    attention = ManhattanAttention(24, 3, initial_decay=math.inf, rotary="none", lce=False).double()
    source = torch.randn(2, 4, 7, 24, dtype=torch.float64)
    plain = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    plain.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    plain.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    plain.out_proj.load_state_dict(attention.out_proj.state_dict())
    tokens = source.flatten(1, 2)
    expected = plain(tokens, tokens, tokens, need_weights=False)[0].unflatten(1, (4, 7))
    torch.testing.assert_close(attention(source), expected, rtol=0, atol=1e-12)


def test_decays_of_the_paper():
    expected = {
        (4, 2, 4): [0.75, 0.875, 0.9375, 0.96875],
        (8, 2, 6): [0.75, 0.851, 0.912, 0.947, 0.969, 0.981, 0.989, 0.993],
    }
    for arguments, gammas in expected.items():
        found = log_decay(*arguments, torch.float64).exp()
        torch.testing.assert_close(found, torch.tensor(gammas, dtype=torch.float64), rtol=0, atol=6e-4)


def test_rotated_products_depend_on_the_raster_distance_alone():
    tables = ManhattanPosition(6, 1)(4, 5, torch.zeros(1, dtype=torch.float64))
    query, key = (torch.randn(6, dtype=torch.float64).expand(1, 4, 5, 1, 6) for _ in range(2))
    turned = [rotate(part, tables.cos, tables.sin).flatten(0, 3) for part in (query, key)]
    products = turned[0] @ turned[1].T
    for offset in range(-19, 20):
        assert products.diagonal(offset).std(unbiased=False) < 1e-12
    assert products.diagonal(1)[0] != pytest.approx(products.diagonal(5)[0])


@HALF
def test_tables_of_a_cast_module_are_not_rounded(dtype):
    attention = ManhattanAttention(32, 2).to(dtype)
    found = attention.position(56, 56, attention.q_proj.weight)
    expected = ManhattanPosition(16, 2)(56, 56, torch.zeros(1, dtype=torch.float64))
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - exact).abs().max() < 3e-4  # float32 phases up to 3135 radians


@FORMS
@PLACEMENTS
@HALF
def test_half_precision_is_near_and_has_gradients(decomposed, placement, dtype):
    torch.manual_seed(0)
    attention = ManhattanAttention(32, 4, decomposed, decay_placement=placement)
    source = torch.randn(1, 33, 35, 32)  # more than one block of rows
    expected = attention(source).detach()
    half = source.to(dtype).requires_grad_()
    found = attention.to(dtype)(half)
    found.float().square().sum().backward()
    assert (found - expected).norm() / expected.norm() < 0.02  # a few roundings of 2^-9; wrong phases give 0.09
    assert half.grad.isfinite().all()
    assert all(part.grad.isfinite().all() for part in attention.parameters())


@FORMS
@PLACEMENTS
def test_autocast_is_near_and_has_gradients(decomposed, placement):
    torch.manual_seed(0)
    attention = ManhattanAttention(32, 4, decomposed, decay_placement=placement)
    source = torch.randn(1, 14, 19, 32, requires_grad=True)
    expected = attention(source).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(source)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert (found - expected).norm() / expected.norm() < 0.02
    assert source.grad.isfinite().all()


@FORMS
@PLACEMENTS
def test_export_with_any_size(decomposed, placement):
    attention = ManhattanAttention(16, 2, decomposed, decay_placement=placement).eval()
    sizes = {0: Dim("batch", max=64), 1: Dim("height", min=2, max=256), 2: Dim("width", min=2, max=256)}
    exported = torch.export.export(attention, (torch.randn(2, 9, 6, 16),), dynamic_shapes=(sizes,)).module()
    for shape in [(1, 14, 14), (3, 7, 21), (2, 30, 5)]:
        source = torch.randn(*shape, 16)
        torch.testing.assert_close(exported(source), attention(source))


def test_shared_tables_are_the_own_ones():
    attention = ManhattanAttention(16, 2)
    source = torch.randn(1, 5, 6, 16)
    tables = ManhattanPosition(8, 2)(5, 6, source)
    assert torch.equal(attention(source, tables), attention(source))
    assert not torch.allclose(attention(source, ManhattanPosition(8, 2, 1)(5, 6, source)), attention(source))


def test_a_bias_is_decay_times_distance():
    bias = map_bias(torch.tensor([-1.0, -0.5]), 1, 4)
    assert bias[1, 0].tolist() == [0.0, -0.5, -1.0, -1.5]
    assert torch.equal(bias, bias.mT)


def test_the_ffn_convolution_is_a_residual_around_the_activation():
    torch.manual_seed(0)
    with_conv, plain = ConvFFN(8, 24), ConvFFN(8, 24, conv=False)
    assert plain.dwconv is None
    plain.load_state_dict({name: part for name, part in with_conv.state_dict().items() if "dwconv" not in name})
    source = torch.randn(1, 5, 7, 8)
    assert not torch.allclose(with_conv(source), plain(source))
    for part in with_conv.dwconv.parameters():
        torch.nn.init.zeros_(part)
    torch.testing.assert_close(with_conv(source), plain(source))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_heads": 5}, "num_heads: must divide dim=16"),
        ({"num_heads": 0}, "num_heads: must divide dim=16"),
        ({"num_heads": 16}, "head_dim: must be even .* rotary='none'"),
        ({"num_heads": 2, "rotary": "rester"}, "rotary: .* did you mean 'raster'"),
        ({"num_heads": 2, "decay_placement": "insid"}, "decay_placement: .* did you mean 'inside'"),
    ],
)
def test_arguments_without_meaning(options, reason):
    with pytest.raises(ArgumentError, match=reason):
        ManhattanAttention(16, **options)


def test_operands_without_meaning():
    query, key, value = operands(3, 4, 2, 5)
    decay = log_decay(2, 2, 4, torch.float64)
    with pytest.raises(ArgumentError, match=r"query, key, value: must all be"):
        manhattan_attention(query, key[:, :2], value, decay)
    with pytest.raises(ArgumentError, match=r"log_decay: must be \[2\]"):
        manhattan_attention(query, key, value, decay[:1])
