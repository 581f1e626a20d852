"""What takes the place of a site's computation, and what it says of itself to those who call it.

Nobody asks for the class of a core: it declares what it is to be given and what can be read off it.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor, nn

from .keys import Grid, Window


class Operands(Enum):
    """What a core of attention is given beside its queries, all of it heads-last.

    Attributes:
        KEYS: keys and values.
        OWN_MAP_TOO: keys and values of a reduced map, and by keyword, as ``local_key`` and ``local_value``
            ``[batch, height, width, heads, dim]``, those that the same projections make of the queries' own map.
        TOKENS: by keyword, as ``pixels`` ``[batch, tokens, channels]``, what feeds the query projection; no keys.
    """

    KEYS = "keys and values"
    OWN_MAP_TOO = "keys and values, and those of the queries' own map"
    TOKENS = "the tokens, to make keys and values of"


class AttentionCore(nn.Module):
    """Mixes the values of one attention site, between projections that stay the site's own.

    Called with heads-last queries ``[batch, tokens, heads, dim]`` and what ``operands`` names, then with the site's
    bias if it has one; at sites whose keys are groups of a map with ``[batch, height, width, heads, dim]`` instead.

    Attributes:
        operands: what it is given beside its queries.
        grid: the queries' map at conversion; None where it needs none.
        keeps_weights: the weights that it gives to keys are those of the original, so that what reads them may go on.
        only_weighs_values: it does nothing to values but weigh them, so that its weights can be read off by unit
            vectors in their place.
        counted_by_formula: its cost is the formula that it states, whatever operations it is made of: its products are
            sums of shifted ones, stand for averages, or are made in larger blocks than there are.

    A core states its cost by a method ``formula``: see ``algebra.core_formula.CostedCore``. One without is counted by
    its operations.
    """

    operands = Operands.KEYS
    grid: Grid | None = None
    keeps_weights = False
    only_weighs_values = False
    counted_by_formula = False

    @property
    def padded(self) -> Window | None:
        """The windows whose padded slots are keys: then it is also given the key and value of such a slot,
        ``[heads, dim]``."""
        return None

    @property
    def mixing(self) -> AttentionCore:
        """What multiplies queries with keys: itself, or the part behind projections of its own."""
        return self

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear] | None:
        """Maps of its own from tokens to keys and to values, if it has them."""
        return None

    def seen(self, queries: Tensor) -> Tensor | None:
        """``[queries, keys]``: which keys some of the queries, by number, see on the map at conversion, where what a
        site loses by it is the attention to the others; else None."""
        return None


class StageCore(nn.Module):
    """Stands between the linear maps of an MLP, or beside the one of a stem, which all stay the site's own.

    Attributes:
        takes_source: it is also given, by keyword as ``source``, what feeds the site's first linear map.
        takes_sides: where the tokens of a map come as a sequence it is also given the map's height and width.
    """

    takes_source = False
    takes_sides = False


__all__ = ["AttentionCore", "Operands", "StageCore"]
