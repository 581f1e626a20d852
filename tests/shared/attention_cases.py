"""Problems of every operator: random ones, one that uses every option, one that uses none; and what they give."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from hypothesis import strategies as st

from attnrewrite import operators
from attnrewrite.operators import (
    AxialProblem,
    BiasedProblem,
    ConvGluProblem,
    GroupedProblem,
    LocalProblem,
    Operator,
    SoftSplitProblem,
)

OPERATORS = {
    operator.problem.name: operator for operator in vars(operators).values() if isinstance(operator, Operator)
}

SMALL = {1: 9, 2: 5, 3: 3}
"""Longest sides by rank, for oracles that loop over tokens."""
MEDIUM = {1: 40, 2: 14, 3: 6}

SMOOTH = ("gelu", "silu", "tanh", "identity")
"""Activations without a kink, next to which rounding would change a derivative."""


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def seeds():
    """To be drawn before anything random is made."""
    return st.integers(0, 1000).map(torch.manual_seed)


rarely = st.sampled_from([False] * 4 + [True])


@st.composite
def head_sizes(draw):
    """Images, heads, and channels of queries and values: mostly as wide as queries, as fused kernels ask."""
    dim = draw(st.sampled_from([1, 2, 4, 4, 8, 8, 17, 17, 0]))
    value_dim = draw(st.sampled_from([dim] * 5 + [3, 8, 0]))
    return draw(st.sampled_from([1, 2] * 4 + [0])), draw(st.sampled_from([1, 2, 3] * 3 + [0])), dim, value_dim


scales = st.sampled_from([0.5, 0.5, 1.0, 0.0])


@st.composite
def local_axes(draw, longest, boundary):
    """Length, kernel size, stride, dilation, offset and causality along one axis; often the window is the map."""
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    stride = draw(st.integers(1, kernel))
    if boundary == "clamp":
        shortest, is_causal = kernel * dilation, draw(st.booleans())
    else:
        shortest, is_causal = draw(st.sampled_from([1, 1, 1, 0])), False
    length = draw(st.integers(shortest, max(longest, shortest)) | st.just(shortest))
    return length, kernel, stride, dilation, draw(st.integers(0, stride - 1)), is_causal


@st.composite
def local_problems(draw, longest=MEDIUM):
    """Half of them with what only some backends add: biases beside the relative one, and weights after the softmax."""
    draw(seeds())
    batch, heads, dim, value_dim = draw(head_sizes())
    rank, boundary = draw(st.integers(1, 3)), draw(st.sampled_from(["clamp", "mask"]))
    axes = [draw(local_axes(longest[rank], boundary)) for _ in range(rank)]
    grid, kernel, stride, dilation, offset, is_causal = zip(*axes, strict=True)
    places, special = prod(kernel), draw(st.booleans())
    entries = (k if boundary == "mask" and s == 1 else 2 * k - 1 for k, s in zip(kernel, stride, strict=True))
    bias = random(heads, *entries) if draw(st.booleans()) else None
    count, has_additional = draw(st.integers(0, 2)), draw(st.booleans())
    has_additional_bias, has_place_bias, has_post = (special and draw(st.booleans()) for _ in range(3))
    return LocalProblem(
        *(random(batch, *grid, heads, size) for size in (dim, dim, value_dim)),
        bias,
        *(random(batch, count, heads, size) if has_additional else None for size in (dim, value_dim)),
        random(heads, *grid, count) if has_additional and has_additional_bias else None,
        random(heads, *grid, places) if has_place_bias else None,
        random(batch, *grid, heads, places) if has_post else None,
        kernel, stride, dilation, offset, is_causal, boundary, draw(scales),
    )  # fmt: skip


@st.composite
def grouped_axes(draw, longest, interval):
    """Length, window size and shift along one axis; the axis may have no tokens."""
    window = draw(st.integers(1, 4))
    return draw(st.integers(1, longest) | st.integers(0, 1)), window, draw(st.integers(0, window * interval - 1))


@st.composite
def grouped_problems(draw, longest=MEDIUM):
    """Rolled ones are windows, as the operator asks."""
    draw(seeds())
    batch, heads, dim, value_dim = draw(head_sizes())
    rank, rolled = draw(st.integers(1, 3)), draw(rarely)
    interval = tuple(1 if rolled else draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank))
    axes = [draw(grouped_axes(longest[rank], step)) for step in interval]
    grid, window, shift = zip(*axes, strict=True)
    slots, has_padding = prod(window), draw(st.booleans())
    bias = random(heads, slots, slots) if draw(st.booleans()) else None
    count, has_additional = draw(st.integers(0, 2)), draw(rarely)
    return GroupedProblem(
        *(random(batch, *grid, heads, size) for size in (dim, dim, value_dim)),
        bias,
        *(random(heads, size) if has_padding else None for size in (dim, value_dim)),
        *(random(batch, count, heads, size) if has_additional else None for size in (dim, value_dim)),
        window, shift, interval, rolled, draw(scales),
    )  # fmt: skip


def decays(heads):
    """None, or a factor of distances for every head."""
    return st.booleans().map(lambda has_decay: -random(heads).abs() if has_decay else None)


@st.composite
def biased_problems(draw, longest=MEDIUM):
    """A table needs keys of the queries' own map; keys of other maps may be more or fewer."""
    draw(seeds())
    batch, heads, dim, value_dim = draw(head_sizes())
    sides = draw(st.tuples(*[st.integers(1, longest[2])] * 2) | st.tuples(*[st.integers(0, 2)] * 2))
    key_sides = draw(st.just(sides) | st.tuples(*[st.integers(1, longest[2])] * 2))
    has_table = key_sides == sides and min(sides) > 0 and draw(st.booleans())
    prefix = draw(st.integers(0, 2))
    queries, keys = prefix + prod(sides), prefix + prod(key_sides)
    return BiasedProblem(
        *(random(batch, *size) for size in ((queries, heads, dim), (keys, heads, dim), (keys, heads, value_dim))),
        draw(decays(heads)),
        random(heads, *(2 * side - 1 for side in sides)) if has_table else None,
        sides, key_sides, prefix, draw(scales),
    )  # fmt: skip


@st.composite
def axial_problems(draw, longest=MEDIUM):
    """Along rows or columns."""
    draw(seeds())
    batch, heads, dim, value_dim = draw(head_sizes())
    sides = draw(st.tuples(*[st.integers(1, longest[2])] * 2) | st.tuples(*[st.integers(0, 2)] * 2))
    maps = (random(batch, *sides, heads, size) for size in (dim, dim, value_dim))
    return AxialProblem(*maps, draw(decays(heads)), draw(st.integers(0, 1)), draw(scales))


@st.composite
def conv_glu_problems(draw, longest=MEDIUM, activations=SMOOTH):
    """Filters may exceed the map."""
    draw(seeds())
    batch, channels = draw(st.sampled_from([1, 2, 2, 0])), draw(st.integers(1, 5))
    shape = (batch, *draw(st.tuples(*[st.integers(1, longest[2])] * 2)), channels)
    side = draw(st.sampled_from([1, 3, 5]))
    return ConvGluProblem(
        random(*shape), random(channels, 1, side, side) / side,
        random(channels) if draw(st.booleans()) else None, random(*shape) if draw(st.booleans()) else None,
        draw(st.sampled_from(activations)), draw(st.sampled_from(activations)),
    )  # fmt: skip


@st.composite
def soft_split_problems(draw, longest=MEDIUM):
    """There is at least one patch."""
    draw(seeds())
    kernel, padding = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    shortest = max(1, kernel - 2 * padding)
    batch, channels = draw(st.sampled_from([1, 2, 2, 0])), draw(st.integers(1, 3))
    sides = draw(st.tuples(*[st.integers(shortest, longest[2])] * 2))
    numbers, out, has_norm = channels * kernel**2, draw(st.integers(1, 5)), draw(st.booleans())
    return SoftSplitProblem(
        random(batch, channels, *sides), random(out, numbers) / kernel,
        random(out) if draw(st.booleans()) else None,
        *(random(numbers) if has_norm else None for _ in range(2)),
        kernel, draw(st.integers(1, 4)), padding, draw(st.sampled_from([1e-5, 1e-2])),
    )  # fmt: skip


PROBLEMS = {
    "local_attention": local_problems,
    "grouped_attention": grouped_problems,
    "biased_attention": biased_problems,
    "axial_attention": axial_problems,
    "conv_glu": conv_glu_problems,
    "soft_split": soft_split_problems,
}


def local_problem(grid, kernel, *, batch=1, heads=2, dim=3, value_dim=2, bias=False, additional=0, **geometry):
    """One of neighborhood attention without stride, dilation and causality unless ``geometry`` says so."""
    ones, zeros = (1,) * len(grid), (0,) * len(grid)
    geometry = {
        "stride": ones, "dilation": ones, "offset": zeros, "is_causal": (False,) * len(grid), "boundary": "clamp",
        "scale": 0.5, **geometry,
    }  # fmt: skip
    return LocalProblem(
        *(random(batch, *grid, heads, size) for size in (dim, dim, value_dim)),
        random(heads, *(2 * k - 1 for k in kernel)) if bias else None,
        *(random(batch, additional, heads, size) if additional else None for size in (dim, value_dim)),
        None, None, None, kernel_size=kernel, **geometry,
    )  # fmt: skip


def grouped_problem(grid, window, *, batch=1, heads=2, dim=3, value_dim=2, bias=False, padded=False, **geometry):
    """One of unshifted windows unless ``geometry`` says so."""
    rank, slots = len(grid), prod(window)
    geometry = {"shift": (0,) * rank, "interval": (1,) * rank, "rolled": False, "scale": 0.5, **geometry}
    return GroupedProblem(
        *(random(batch, *grid, heads, size) for size in (dim, dim, value_dim)),
        random(heads, slots, slots) if bias else None,
        *(random(heads, size) if padded else None for size in (dim, value_dim)),
        None, None, window_size=window, **geometry,
    )  # fmt: skip


def full_problem(name, batch=2, sides=(5, 6)):
    """A problem with every operand and no option at its default."""
    dim, heads, tokens = 3, 2, 1 + prod(sides)
    maps = [random(batch, *sides, heads, size) for size in (dim, dim, 4)]
    additional = [random(batch, 2, heads, size) for size in (dim, 4)]
    decay = torch.tensor([-0.3, -0.7], dtype=torch.float64)
    if name == "local_attention":
        return LocalProblem(
            *maps, random(heads, 5, 3), *additional, random(heads, *sides, 2), random(heads, *sides, 6),
            random(batch, *sides, heads, 6), (3, 2), (2, 1), (1, 2), (1, 0), (False, True), "clamp", 0.7,
        )  # fmt: skip
    if name == "grouped_attention":
        pads = [random(heads, size) for size in (dim, 4)]
        return GroupedProblem(
            *maps, random(heads, 6, 6), *pads, *additional, (3, 2), (1, 1), (1, 2), False, 0.7
        )
    if name == "biased_attention":
        table = random(heads, *(2 * side - 1 for side in sides))
        sequences = [random(batch, tokens, heads, size) for size in (dim, dim, 4)]
        return BiasedProblem(*sequences, decay, table, sides, sides, 1, 0.7)
    if name == "axial_attention":
        return AxialProblem(*maps, decay, 0, 0.7)
    if name == "conv_glu":
        gate, value = random(batch, *sides, dim), random(batch, *sides, dim)
        return ConvGluProblem(gate, random(dim, 1, 3, 3), random(dim), value, "gelu", "silu")
    image, norm = random(batch, dim, *sides), random(2, dim * 9)
    return SoftSplitProblem(image, random(4, dim * 9), random(4), norm[0], norm[1], 3, 2, 1, 1e-2)


def bare_problem(name, batch=2, sides=(5, 6)):
    """One without any operand that may be absent."""
    full = full_problem(name, batch, sides)
    absent = {
        "local_attention": ("bias", "additional_keys", "additional_values", "additional_bias", "place_bias", "post"),
        "grouped_attention": ("bias", "pad_key", "pad_value", "additional_keys", "additional_values"),
        "biased_attention": ("log_decay", "table"),
        "axial_attention": ("log_decay",),
        "conv_glu": ("bias", "value"),
        "soft_split": ("bias", "norm_weight", "norm_bias"),
    }[name]
    return replace(full, **dict.fromkeys(absent))


def of_dtype(problem, dtype):
    """The same problem in another dtype; what keeps its precision keeps it."""
    kept = [name in problem.keeps_precision for name in problem.operand_names]
    return problem.with_operands(
        [x if x is None or keeps else x.to(dtype) for x, keeps in zip(problem.operands, kept, strict=True)]
    )


def on(backend):
    """Problems run by one backend."""
    return lambda problem: OPERATORS[problem.name](problem, backend)


def results(run, problem):
    """What ``run`` gives, and the gradient of every operand, under fixed random cotangents."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in problem.operands]
    outputs = run(problem.with_operands(leaves))
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
