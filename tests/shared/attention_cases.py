"""Random geometry and operands, and results together with gradients."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import strategies as st


@st.composite
def local_axes(draw, longest):
    """Length, kernel size, stride, dilation and causality along one axis."""
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    length = draw(st.integers(kernel * dilation, max(longest, kernel * dilation)))
    return length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@st.composite
def grouped_axes(draw, longest, shortest=1):
    """Length, window size and shift along one axis."""
    window = draw(st.integers(1, 4))
    return draw(st.integers(shortest, longest)), window, draw(st.integers(0, window - 1))


def local_operands(grid, kernel, *, batch=1, heads=2, dim=3, value_dim=2, bias=False, additional=0):
    """The six tensors of local attention in float64."""
    extra = [random(batch, additional, heads, size) if additional else None for size in (dim, value_dim)]
    table = random(heads, *(2 * k - 1 for k in kernel)) if bias else None
    return [*_maps(batch, grid, heads, dim, value_dim), table, *extra]


def grouped_operands(grid, window, *, batch=1, heads=2, dim=3, value_dim=2, bias=False, padded=False):
    """The six tensors of grouped attention in float64."""
    pads = [random(heads, size) if padded else None for size in (dim, value_dim)]
    table = random(heads, prod(window), prod(window)) if bias else None
    return [*_maps(batch, grid, heads, dim, value_dim), table, *pads]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def results(function, tensors):
    """Output, log-sum-exp and the gradient of every given tensor, under fixed random cotangents."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    loss = sum((out.double() * cotangent).sum() for out, cotangent in zip(outputs, cotangents, strict=True))
    given = [leaf for leaf in leaves if leaf is not None]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, given, materialize_grads=True)]


def assert_same(actual, expected, tolerance=1e-11):
    """Largest difference relative to max(1, largest expected value), for each pair."""
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape
        error = deviation(one, other)
        assert error <= tolerance, f"result {number}: {error:.1e}"


def deviation(actual, expected):
    if not expected.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _maps(batch, grid, heads, dim, value_dim):
    return [random(batch, *grid, heads, size) for size in (dim, dim, value_dim)]
