"""What the modules of this library cost by their definition, whatever operations they are made of.

Some products are not spelled as contractions (a window's scores are sums of shifted products), some contractions stand
for something else (an average written as a product with ones, position codes appended to keys). So that a cost is
that of the operator and not of its spelling, such a module is counted by its formula; ``Trace.executed`` keeps what its
operations contract. The others have a formula that has to equal the count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sympy import Integer, Max, sympify
from torch import Tensor, nn

from ...cores.tokens_to_token import TokensToTokenBranch, TokensToTokenStem
from ...modules.aggregated import AggregatedAttention
from ...modules.cosine_attention import CPB_HIDDEN, CosineAttention
from ...modules.long_short_distance import LongShortDistanceAttention
from ...modules.manhattan import ManhattanAttention
from ...modules.neighborhood_block import NeighborhoodAttention2d
from ...modules.tokens_to_token import TokensToToken
from ..algebra import formulas
from ..algebra.site_formula import Extent, SiteFormula, Widths
from ..algebra.symbols import down, offsets
from .core_calls import BY_DEFINITION, cost_of_core_call
from .cost import LAYER_NORM, Cost


@dataclass(frozen=True)
class Definition:
    """How to read one class of modules.

    Attributes:
        formula: of the module and the sides of its map; None for options that no formula covers.
        argument: the forward's argument that holds the map; ``channels_first`` says how.
        beside: further arguments, which change no cost; any other one does.
        replaces_count: whether the module is counted by the formula.
        result: the sides of the map it makes, where those are others; ``result_first`` says how that lies.
        normalization: what fvcore charges an image for norms and poolings that are no operations of their own.
    """

    formula: Callable[[Any, Extent, Extent], SiteFormula | None]
    argument: str = "source"
    beside: tuple[str, ...] = ("tables",)
    channels_first: bool = False
    replaces_count: bool = False
    kind: str = "attention"
    result: Callable[[Extent, Extent], tuple[Any, Any]] | None = None
    result_first: bool = False
    normalization: Callable[[Any, Extent, Extent], Any] | None = None

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[2], shape[3]) if self.channels_first else (shape[1], shape[2])

    def result_sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[2], shape[3]) if self.result_first else (shape[1], shape[2])

    def is_plain(self, arguments: dict[str, Any]) -> bool:
        """Whether the map is the only thing that changes the cost."""
        return all(v is None for name, v in arguments.items() if name != self.argument and name not in self.beside)


def definition_of(module: nn.Module) -> Definition | None:
    return _DEFINITIONS.get(type(module))


def is_defined(module: nn.Module) -> bool:
    """Whether ``defined_cost`` may have something to say."""
    return type(module) in _DEFINITIONS or type(module) in BY_DEFINITION


def defined_cost(module: nn.Module, arguments: dict[str, Any]) -> Cost | None:
    """MACs, and the price of absorbed norms, of one call; None for modules that are counted by their operations."""
    definition = definition_of(module)
    if definition is None:
        return cost_of_core_call(module, arguments)
    source = arguments[definition.argument]
    if not definition.replaces_count or not definition.is_plain(arguments) or not isinstance(source, Tensor):
        return None
    shape = tuple(source.shape)
    sides = tuple(map(Integer, definition.sides(shape)))
    formula = definition.formula(module, *sides)
    if formula is None:
        return None
    absorbed = 0 if definition.normalization is None else int(definition.normalization(module, *sides))
    return Cost(formula.macs_of(shape[0], 1, 1), normalization=shape[0] * absorbed)


def _aggregated(module: AggregatedAttention, height: Extent, width: Extent) -> SiteFormula | None:
    if not module.pool or module.reducer is not None or module.interpolate_bias:
        return None
    if module.pool_size is not None:
        cells = tuple(map(Integer, module.pool_size))
    else:
        assert module.sr_ratio is not None
        cells = tuple(Max(1, down(s, Integer(r))) for s, r in zip((height, width), module.sr_ratio, strict=True))
    formula = formulas.aggregated_attention(
        height * width, cells[0] * cells[1], module.window_size, _widths(module),
        learnable=module.learnable_tokens is not None,
    )  # fmt: skip
    if module.cpb_fc1 is None:
        return formula
    return formulas.with_position_mlp(formula, offsets(height, cells[0]) * offsets(width, cells[1]), CPB_HIDDEN)


def _cosine(module: CosineAttention, height: Extent, width: Extent) -> SiteFormula | None:
    formula = formulas.self_attention(height * width, _widths(module))
    if module.interpolate_bias:
        return None
    if module.cpb_fc1 is None:
        return formula
    return formulas.with_position_mlp(formula, (2 * height - 1) * (2 * width - 1), CPB_HIDDEN)


def _manhattan(module: ManhattanAttention, height: Extent, width: Extent) -> SiteFormula:
    local = 0 if module.lepe is None else 5
    return formulas.manhattan_attention(height, width, _widths(module), decomposed=module.decomposed, local=local)


def _long_short(module: LongShortDistanceAttention, height: Extent, width: Extent) -> SiteFormula | None:
    rows, columns = module.group_size
    if rows != columns or isinstance(module.interval, str) or module.small_map != "shrink":
        return None
    if module.padding != "mask" or module.centered:
        return None
    interval = 1 if module.interval is None else int(module.interval)
    return formulas.long_short_attention(
        height, width, rows, interval, _widths(module), position_bias=module.pos is not None
    )


def _neighborhood(module: NeighborhoodAttention2d, height: Extent, width: Extent) -> SiteFormula:
    kernel, dilation = (module.kernel_size,) * 2, (module.dilation,) * 2
    return formulas.neighborhood_attention(height, width, 0, kernel, dilation, _widths(module))


def _tokens_to_token(module: TokensToToken, height: Extent, width: Extent) -> SiteFormula | None:
    performer = hasattr(module.attention1, "w")
    first, second = (int(layer.norm2.normalized_shape[0]) for layer in (module.attention1, module.attention2))  # type: ignore[union-attr, index]  # nn.LayerNorm
    channels = module.attention1.projection().in_features // 49
    return formulas.tokens_to_token(
        sympify(height), sympify(width), channels, module.project.out_features,
        widths_inside=(first, second), performer=performer,
    )  # fmt: skip


def _pooling(module: AggregatedAttention, height: Extent, width: Extent) -> Any:
    return height * width * module.proj.in_features


def _patch_norms(module: TokensToToken, height: Extent, width: Extent) -> Any:
    if not isinstance(module.attention1.norm1, nn.LayerNorm):
        return 0
    splits = formulas.soft_splits(height, width)
    layers = (module.attention1, module.attention2)
    return LAYER_NORM * sum(
        rows * columns * layer.projection().in_features for (rows, columns), layer in zip(splits, layers, strict=False)
    )


def _widths(module: Any) -> Widths:
    out = module.proj if hasattr(module, "proj") else module.out_proj
    return Widths(out.out_features, module.num_heads, out.in_features)


STRIDE = Integer(TokensToTokenStem.STRIDE)
_DEFINITIONS: dict[type[nn.Module], Definition] = {
    AggregatedAttention: Definition(_aggregated, replaces_count=True, normalization=_pooling),
    CosineAttention: Definition(_cosine),
    NeighborhoodAttention2d: Definition(_neighborhood),
    ManhattanAttention: Definition(_manhattan, replaces_count=True),
    LongShortDistanceAttention: Definition(_long_short),
    TokensToToken: Definition(
        _tokens_to_token, "image", channels_first=True, replaces_count=True, kind="stem",
        result=lambda height, width: formulas.soft_splits(height, width)[-1], normalization=_patch_norms,
    ),
    TokensToTokenStem: Definition(
        _tokens_to_token, "image", channels_first=True, replaces_count=True, kind="stem",
        result=lambda height, width: (down(height, STRIDE), down(width, STRIDE)), result_first=True,
        normalization=_patch_norms,
    ),
    TokensToTokenBranch: Definition(
        _tokens_to_token, "source", ("projected",), channels_first=True, replaces_count=True, kind="stem",
        normalization=_patch_norms,
    ),
}  # fmt: skip
