"""The symbols costs are written in, and what is asked of such expressions: value, order, envelope.

``H`` and ``W`` are the image's sides in pixels and ``B`` the batch. All are positive integers, so that rounding
disappears where it rounds nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, reduce
from typing import Any, ClassVar

import sympy
from sympy import Add, Expr, Function, Integer, Max, Min, Poly, Rational, Symbol

from ..ir.sites import Window
from ..operators.partition_rule import AxisPartition, attended_slots


def symbol(name: str) -> Symbol:
    return Symbol(name, positive=True, integer=True)


B, H, W = symbol("B"), symbol("H"), symbol("W")
_ROW, _COLUMN, _SIDE = symbol("a"), symbol("b"), symbol("s")


def _quotient(printer: Any, x: Expr, m: Expr) -> str:
    return f"({printer.doprint(x)})/{m}" if isinstance(x, Add) else printer.doprint(x / m)


class _Count(Function):
    """A function whose values are natural numbers or zero."""

    is_integer = True
    is_nonnegative = True

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        """``exp`` is the exponent of its power, which sympy leaves to the function."""
        return self._tex(printer) if exp is None else rf"{self._tex(printer)}^{{{exp}}}"

    @abstractmethod
    def _tex(self, printer: Any) -> str:
        """Of the function itself."""


class down(_Count):
    """``⌊x / m⌋``."""

    nargs = 2

    @classmethod
    def eval(cls, x: Expr, m: Expr) -> Expr | None:
        return _rounded(cls, x, m, lambda value, unit: value // unit)

    def _sympystr(self, printer: Any) -> str:
        return f"⌊{_quotient(printer, *self.args)}⌋"

    def _tex(self, printer: Any) -> str:
        return rf"\left\lfloor {printer.doprint(self.args[0] / self.args[1])} \right\rfloor"


class up(_Count):
    """``⌈x / m⌉``."""

    nargs = 2

    @classmethod
    def eval(cls, x: Expr, m: Expr) -> Expr | None:
        return _rounded(cls, x, m, lambda value, unit: -(-value // unit))

    def _sympystr(self, printer: Any) -> str:
        return f"⌈{_quotient(printer, *self.args)}⌉"

    def _tex(self, printer: Any) -> str:
        return rf"\left\lceil {printer.doprint(self.args[0] / self.args[1])} \right\rceil"


class block_pairs(_Count):
    """Pairs (token, slot of its block) along an axis of ``length`` cut into blocks of ``size`` at ``shift``.

    ``padding_keys`` (0 or 1): padded slots count as keys; otherwise border blocks are truncated. ``rolled_first``
    (0 or 1): the axis is rolled before it is padded, which only tells where padding is.
    """

    nargs = 5

    @classmethod
    def eval(cls, length: Expr, size: Expr, shift: Expr, padding_keys: Expr, rolled_first: Expr) -> Expr | None:
        if all(isinstance(value, Integer) for value in (length, size, shift, padding_keys, rolled_first)):
            return Integer(count_block_pairs(int(length), int(size), int(shift), int(padding_keys), int(rolled_first)))
        if (length / size).is_integer:
            return length * size - 2 * shift * (size - shift)
        return None

    def _sympystr(self, printer: Any) -> str:
        length, size, shift, *_ = self.args
        return f"pairs({printer.doprint(length)}; {size}, {shift})"

    def _tex(self, printer: Any) -> str:
        length, size, shift, *_ = (printer.doprint(value) for value in self.args)
        return rf"\operatorname{{pairs}}_{{{size},{shift}}}\left({length}\right)"


class offsets(_Count):
    """Distinct distances, along an axis, from its pixels to the centers of the ``cells`` they are pooled to."""

    nargs = 2

    @classmethod
    def eval(cls, side: Expr, cells: Expr) -> Expr | None:
        if isinstance(side, Integer) and isinstance(cells, Integer):
            return Integer(count_offsets(int(side), int(cells)))
        return 2 * side - side / cells if (side / cells).is_integer else None

    def _sympystr(self, printer: Any) -> str:
        return f"offsets({printer.doprint(self.args[0])}, {printer.doprint(self.args[1])})"

    def _tex(self, printer: Any) -> str:
        side, cells = (printer.doprint(value) for value in self.args)
        return rf"\operatorname{{offsets}}\left({side}, {cells}\right)"


@cache
def count_offsets(side: int, cells: int) -> int:
    """The number that ``offsets`` stands for, in half pixels as a cell's center may lie between two."""
    bounds = ((cell * side // cells, -(-(cell + 1) * side // cells)) for cell in range(cells))
    return len({2 * pixel - (start + end - 1) for start, end in bounds for pixel in range(side)})


class group_pairs(_Count):
    """Pairs (token, token of its group) of a map cut into groups of ``group`` x ``group``, ``interval`` apart.

    Maps that a group covers are cut into windows of their shorter side.
    """

    nargs = 4

    @classmethod
    def eval(cls, height: Expr, width: Expr, group: Expr, interval: Expr) -> Expr | None:
        if all(isinstance(value, Integer) for value in (height, width, group, interval)):
            return Integer(count_group_pairs(int(height), int(width), int(group), int(interval)))
        return None

    def _sympystr(self, printer: Any) -> str:
        height, width, group, interval = (printer.doprint(value) for value in self.args)
        return f"pairs({height}, {width}; {group}·{interval})"

    def _tex(self, printer: Any) -> str:
        height, width, group, interval = (printer.doprint(value) for value in self.args)
        return rf"\operatorname{{pairs}}_{{{group} \cdot {interval}}}\left({height}, {width}\right)"


def count_group_pairs(height: int, width: int, group: int, interval: int) -> int:
    """The number that ``group_pairs`` stands for."""
    if min(height, width) <= group:
        group, interval = min(group, height, width), 1
    rows, columns = (attended_slots(AxisPartition(side, group, interval=interval)) for side in (height, width))
    return rows * columns


class _GroupedAxis(_Count):
    """A number of an axis of ``side`` tokens, cut into groups of ``group`` tokens, ``interval`` apart."""

    nargs = 3
    word: ClassVar[str]

    @staticmethod
    @abstractmethod
    def counted(side: int, group: int, interval: int) -> int:
        """The number for three integers."""

    @classmethod
    def eval(cls, side: Expr, group: Expr, interval: Expr) -> Expr | None:
        if all(isinstance(value, Integer) for value in (side, group, interval)):
            return Integer(cls.counted(int(side), int(group), int(interval)))
        return None

    def _sympystr(self, printer: Any) -> str:
        side, group, interval = (printer.doprint(value) for value in self.args)
        return f"{self.word}({side}; {group}·{interval})"

    def _tex(self, printer: Any) -> str:
        side, group, interval = (printer.doprint(value) for value in self.args)
        return rf"\operatorname{{{self.word}}}_{{{group} \cdot {interval}}}\left({side}\right)"


def count_interval_pairs(side: int, group: int, interval: int) -> int:
    """The number that ``interval_pairs`` stands for."""
    return side**2 if side <= group else attended_slots(AxisPartition(side, group, interval=interval))


class interval_pairs(_GroupedAxis):
    """Pairs of a token and a token of its group; an axis that a group covers is one group."""

    word = "pairs"
    counted = staticmethod(count_interval_pairs)


def count_grouped_side(side: int, group: int, interval: int) -> int:
    """The number that ``grouped_side`` stands for."""
    return side if side <= group else -(-side // (group * interval)) * group * interval


class grouped_side(_GroupedAxis):
    """The axis padded to whole groups; one that a group covers is not padded."""

    word = "padded"
    counted = staticmethod(count_grouped_side)


@cache
def count_block_pairs(length: int, size: int, shift: int, padding_keys: int, rolled_first: int) -> int:
    """The number that ``block_pairs`` stands for. An axis that fits into one block is not shifted."""
    if rolled_first and length % size:
        return Window((size, size), (shift, shift), bool(padding_keys), True).axis_pairs(length)
    return attended_slots(AxisPartition(length, size, shift if length > size else 0, bool(padding_keys)))


def strided(x: Expr, kernel: int, stride: int, padding: int) -> Expr:
    """The side of a convolution's result on an axis of ``x``: ``⌊(x + 2 padding - kernel) / stride⌋ + 1``."""
    offset = 2 * padding - kernel + stride
    return up(x, stride) if offset == stride - 1 else down(x + offset, stride)


def evaluator(expression: Expr) -> Callable[[int, int, int], int]:
    """``(batch, height, width) -> value`` in exact integers.

    ``expression`` is whole-valued wherever it is asked; its rational coefficients share one denominator.
    """
    denominators = [int(number.q) for number in expression.atoms(Rational)]
    unit = reduce(sympy.ilcm, denominators, 1)
    scaled = expression if unit == 1 else sympy.expand(expression * unit)
    names: dict[str, Any] = {
        "down": lambda x, m: x // m,
        "up": lambda x, m: -(-x // m),
        "block_pairs": count_block_pairs,
        "Min": min,
        "Max": max,
    }
    names |= {"offsets": count_offsets, "group_pairs": count_group_pairs, "interval_pairs": count_interval_pairs}
    names |= {"grouped_side": count_grouped_side}
    compute = sympy.lambdify((B, H, W), scaled, modules=[names], cse=True)
    return compute if unit == 1 else lambda batch, height, width: compute(batch, height, width) // unit


@cache
def lattice_unit(expression: Expr) -> int:
    """The smallest multiple of pixels on which no rounding in ``expression`` rounds anything."""
    units = [_unit(part) for part in _unclipped(expression).atoms(down, up, block_pairs, offsets)]
    return int(reduce(sympy.ilcm, units, 1))


def envelope(expression: Expr) -> Expr:
    """The polynomial in H and W that ``expression`` equals on its lattice, where no map is smaller than a kernel."""
    unit = lattice_unit(expression)
    on_lattice = _unclipped(expression).subs({H: unit * _ROW, W: unit * _COLUMN}, simultaneous=True)
    return sympy.expand(on_lattice).subs({_ROW: H / unit, _COLUMN: W / unit}, simultaneous=True)


def in_side(expression: Expr) -> Poly:
    """The envelope on square images as a polynomial in the side."""
    return Poly(envelope(expression).subs({H: _SIDE, W: _SIDE}, simultaneous=True), _SIDE)


def leading(polynomial: Expr) -> Expr:
    """The terms of a polynomial in H and W of the highest degree in both together."""
    terms = [(sum(powers), powers, factor) for powers, factor in Poly(polynomial, H, W).terms()]
    highest = max(degree for degree, _, _ in terms)
    return Add(*(factor * H ** powers[0] * W ** powers[1] for degree, powers, factor in terms if degree == highest))


def order(expression: Expr) -> str:
    """Θ in the number of pixels n, everything else fixed."""
    degree = in_side(expression).degree() if expression.free_symbols & {H, W} else 0
    return {0: "Θ(1)", 1: "Θ(n^{1/2})", 2: "Θ(n)", 3: "Θ(n^{3/2})", 4: "Θ(n²)"}.get(degree, f"Θ(n^{{{degree}/2}})")


def plain(expression: Expr) -> str:
    """As one writes it: ``4·C²·N + 2·C·N²``."""
    text = sympy.sstr(expression, order="grlex").replace("**", "^").replace("*", "·")
    return _superscripts(text)


@cache
def _superscript_digits() -> dict[int, int]:
    return str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _superscripts(text: str) -> str:
    head, *powers = text.split("^")
    for power in powers:
        digits = len(power) - len(power.lstrip("0123456789"))
        head += power[:digits].translate(_superscript_digits()) + power[digits:] if digits else f"^{power}"
    return head


def _rounded(kind: Any, x: Expr, m: Expr, divide: Callable[[Any, Any], Any]) -> Expr | None:
    """What is divisible leaves the rounding; the same rounding twice is one."""
    if m == 1:
        return x
    if isinstance(x, kind):
        return kind(x.args[0], x.args[1] * m)
    whole = Add(*(term / m for term in Add.make_args(x) if (term / m).is_integer))
    rest = x - whole * m
    if isinstance(rest, Integer) and isinstance(m, Integer):
        return whole + Integer(divide(int(rest), int(m)))
    return whole + kind(rest, m) if whole != 0 else None


def _unit(part: Expr) -> int:
    x, m = part.args[:2]
    inner = [_unit(deeper) for argument in (x, m) for deeper in argument.atoms(down, up, block_pairs, offsets)]
    own = int(m) if isinstance(m, Integer) else 1  # a number of cells that grows with the image
    return own * int(reduce(sympy.ilcm, inner, 1))


def _unclipped(expression: Expr) -> Expr:
    """Without the cases of small maps: of a minimum what does not grow, of a maximum what does, and padded groups."""
    fixed = expression.replace(Min, lambda *choices: _chosen(Min, choices, grows=False))
    growing = fixed.replace(Max, lambda *choices: _chosen(Max, choices, grows=True))
    padded = growing.replace(
        group_pairs,
        lambda height, width, group, interval: (
            _padded(height, group * interval) * _padded(width, group * interval) * group**2
        ),
    )
    padded = padded.replace(interval_pairs, lambda side, group, interval: _padded(side, group * interval) * group)
    return padded.replace(grouped_side, lambda side, group, interval: _padded(side, group * interval))


def _chosen(kind: Any, choices: tuple[Expr, ...], grows: bool) -> Expr:
    wanted = [choice for choice in choices if bool(choice.free_symbols) == grows]
    return wanted[0] if len(wanted) == 1 else kind(*choices)


def _padded(side: Expr, unit: Expr) -> Expr:
    return up(side, unit) * unit
