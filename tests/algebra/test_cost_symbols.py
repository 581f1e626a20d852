"""Roundings, orders and evaluation of cost expressions."""

import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer, Min, Rational, srepr, sympify

from attnrewrite.algebra import symbols
from attnrewrite.algebra.crossover import cheaper_above, crossings
from attnrewrite.algebra.interpolate import fitted
from attnrewrite.algebra.symbols import (
    B,
    H,
    W,
    block_pairs,
    down,
    envelope,
    evaluator,
    grouped_side,
    lattice_unit,
    offsets,
    order,
    plain,
    strided,
    up,
)  # fmt: skip

SIDES = st.integers(1, 500)
SMALL = st.integers(1, 12)


@given(SIDES, SMALL, SMALL)
def test_roundings_collapse_to_what_they_are(side, first, second):
    for kind, exact in ((down, lambda x, m: x // m), (up, lambda x, m: -(-x // m))):
        nested = kind(kind(H, Integer(first)), Integer(second))
        assert evaluator(nested)(1, side, 1) == exact(exact(side, first), second)
        assert nested.subs(H, side) == exact(exact(side, first), second)


@given(SIDES, SMALL, SMALL)
def test_roundings_vanish_on_multiples(side, unit, factor):
    assert down(H * unit * factor, Integer(unit)) == up(H * unit * factor, Integer(unit)) == factor * H
    assert down(H * unit + side, Integer(unit)) == H + side // unit


@given(st.integers(16, 300), SMALL, SMALL, st.integers(0, 5))
def test_a_strided_side_is_torchs(side, kernel, stride, padding):
    expected = (side + 2 * padding - kernel) // stride + 1
    assert evaluator(strided(H, kernel, stride, padding))(1, side, 1) == expected


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 8), st.booleans(), st.booleans())
def test_block_pairs_are_those_of_the_slots_present(length, size, shift, padding_keys, rolled_first):
    shift = shift % size if length > size else 0
    padded = -(-length // size) * size
    extent = padded if padding_keys else length
    block = [(place - shift) // size for place in range(extent)]
    if rolled_first and shift:  # the last block falls apart where the rolled-over tokens would begin
        slot = {(place - shift) % length: place for place in range(length)} | {p: p for p in range(length, padded)}
        block = [0] * extent
        for rolled, place in slot.items():
            if place < extent:
                block[place] = rolled // size if rolled < padded - shift else -1
    expected = sum(block[token] == block[slot] for token in range(length) for slot in range(extent))
    pairs = block_pairs(H, *map(Integer, (size, shift, padding_keys, rolled_first)))
    assert evaluator(pairs)(1, length, 1) == expected
    if length % size == 0 and length > size:
        assert pairs.subs(H, size * W).subs(W, length // size) == expected


@given(SIDES, SMALL, SMALL)
def test_grouped_sides_are_padded_where_a_group_does_not_cover_them(side, group, interval):
    padded = evaluator(grouped_side(H, Integer(group), Integer(interval)))(1, side, 1)
    assert padded >= side
    assert padded == side if side <= group else (padded % (group * interval) == 0 and padded - side < group * interval)
    assert envelope(grouped_side(H, Integer(group), Integer(interval))) == H


def test_the_lattice_of_cells_whose_number_grows_with_the_side():
    side = up(H, Integer(4))
    distances = offsets(side, down(side, Integer(8)))
    assert lattice_unit(distances) == 32
    assert all(evaluator(distances)(1, side, 1) == envelope(distances).subs(H, side) for side in (32, 64, 224))


def test_orders():
    tokens = down(H, Integer(16)) * down(W, Integer(16)) + 1
    assert order(Integer(5)) == "Θ(1)"
    assert order(3 * tokens) == "Θ(n)"
    assert order(tokens * (down(H, Integer(4)) + down(W, Integer(4)))) == "Θ(n^{3/2})"
    assert order(tokens**2) == "Θ(n²)"
    assert order(tokens * Min(7, tokens)) == "Θ(n)"
    assert envelope(tokens) == H * W / 256 + 1


def test_evaluation_is_exact_where_floats_are_not():
    expression = Rational(31, 1024) * H**2 * W**2 * 10**9 + H * W + 7
    assert evaluator(B * expression)(3, 2**20, 2**20) == 3 * (31 * 10**9 * 2**70 + 2**40 + 7)


def test_text_is_as_one_writes_it():
    names = sympy.symbols("N C", positive=True, integer=True)
    assert plain(4 * names[0] * names[1] ** 2 + 2 * names[0] ** 2 * names[1]) == "4·C²·N + 2·C·N²"
    assert plain(down(H + 1, Integer(4))) == "⌊(H + 1)/4⌋"
    assert plain(up(H, Integer(4))) == "⌈H/4⌉"


def test_powers_of_roundings_are_written_in_latex():
    side = down(H, Integer(4))
    assert sympy.latex(side**2) == sympy.latex(side) + "^{2}"
    assert sympy.latex(grouped_side(H, Integer(7), Integer(2)) ** 3).endswith("^{3}")


def test_expressions_survive_their_representation():
    expression = down(H, Integer(4)) * up(W, Integer(7)) + block_pairs(H, *map(Integer, (7, 3, 1, 0)))
    expression += grouped_side(H, Integer(7), Integer(2))
    names = {name: getattr(symbols, name) for name in ("down", "up", "block_pairs", "grouped_side")}
    assert sympify(srepr(expression), locals=names) == expression


def test_interpolation_finds_polynomials_and_refuses_others():
    exact = Rational(3, 256) * H**2 * W**2 + 5 * H**2 * W + 11 * H * W + 13

    def count(height, width):
        return int(exact.subs({H: height, W: width}))

    assert fitted(count, 16, (224, 224)) == exact
    assert fitted(lambda h, w: count(h, w) + (h > 250), 16, (224, 224)) is None
    assert fitted(lambda h, w: count(h, w) if h < 250 else None, 16, (224, 224)) is None


def test_every_crossing_is_found():
    first, second = H * W * (H - 40) * (W - 100), Integer(0) * H
    assert crossings(first + 1, second + 1) == [40.0, 100.0]
    assert cheaper_above(H * W, 2 * H * W) is None
    assert cheaper_above(2 * H * W, H * W) == 0.0
    assert cheaper_above(H**2 * W**2, 100 * H * W) == 10.0
    assert crossings(H, H) == []
