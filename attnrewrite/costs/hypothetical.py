"""What a conversion would cost, from formulas alone: nothing is converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, nearest
from ..ir import AttentionSite, Reduced, Window
from ..layout import as_pair
from ..targets import Target
from . import formulas
from .comparison import ComparedSite, Comparison
from .derive import ModelFormula
from .formulas import C, D, N, SiteFormula, Widths
from .sites import CountedSite
from .symbols import H, W

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True)
class Neighborhood:
    """``kernel_size`` None: 7 on global sites, and on windowed ones the same blocks without padding."""

    kernel_size: int | tuple[int, int] | None = None
    dilation: int | tuple[int, int] = 1

    def attention(self, site: CountedSite, index: int) -> SiteFormula:
        keys = site.site.keys if isinstance(site.site, AttentionSite) else None
        height, width = _sides(site)
        if isinstance(keys, Window) and self.kernel_size is None:
            return formulas.block_attention(height, width, keys.size, keys.shift, keys.phantom, _widths(site))
        if isinstance(keys, Reduced):
            assert site.formula is not None
            return replace(site.formula, kind="reduced NA")
        kernel, dilation = as_pair(7 if self.kernel_size is None else self.kernel_size), as_pair(self.dilation)
        return formulas.neighborhood_attention(height, width, _prefix(site), kernel, dilation, _widths(site))


@dataclass(frozen=True)
class DilatedNeighborhood(Neighborhood):
    """As ``Neighborhood``: dilation costs nothing."""


@dataclass(frozen=True)
class Aggregated:
    """TransNeXt's: ``pool`` R pools R x R tokens to a cell, ``pool_size`` p the whole map to p x p cells (None: 7).

    The position MLP is left out: it is constant at a fixed size.
    """

    window_size: int = 3
    pool: int | None = None
    pool_size: int | None = None
    learnable_tokens: bool = True

    def attention(self, site: CountedSite, index: int) -> SiteFormula:
        if self.pool_size and self.pool:
            raise ArgumentError("pool_size: give pool or pool_size, not both")
        height, width = _sides(site)
        cells = self.pool_size or 7
        pooled = formulas.cells(height, width, self.pool) if self.pool else cells * cells
        tokens = height * width + _prefix(site)
        return formulas.aggregated_attention(
            tokens, pooled, self.window_size, _widths(site), learnable=self.learnable_tokens
        )


@dataclass(frozen=True)
class Manhattan:
    """RMT's on the whole map, with its local convolution of the values."""

    lce: bool = True
    decomposed = False

    def attention(self, site: CountedSite, index: int) -> SiteFormula:
        height, width = _sides(site)
        local = 5 if self.lce else 0
        return formulas.manhattan_attention(
            height, width, _widths(site), decomposed=self.decomposed, local=local, prefix=_prefix(site)
        )


@dataclass(frozen=True)
class ManhattanDecomposed(Manhattan):
    """RMT's along rows, then along columns."""

    decomposed = True


@dataclass(frozen=True)
class LongShortDistance:
    """CrossFormer's, short and long distance in turn. ``interval`` None spreads a group over the example's map."""

    group_size: int = 7
    interval: int | None = None
    position_bias: bool = True

    def attention(self, site: CountedSite, index: int) -> SiteFormula:
        height, width = _sides(site)
        smallest = min(_numbers(site))
        spread = -(-smallest // self.group_size) if self.interval is None else self.interval
        interval = spread if index % 2 and smallest > self.group_size else 1
        return formulas.long_short_attention(
            height, width, self.group_size, interval, _widths(site), position_bias=self.position_bias
        )


@dataclass(frozen=True)
class ConvGlu:
    """TransNeXt's gated MLP; ``hidden`` "match" takes two thirds of the width, "keep" keeps it."""

    hidden: str = "match"

    def mlp(self, site: CountedSite, index: int) -> SiteFormula:
        assert site.formula is not None
        if self.hidden not in ("match", "keep"):
            raise ArgumentError(f"hidden: expected 'match' or 'keep', got {self.hidden!r}")
        values = site.formula.values
        width, hidden = int(values[C]), int(values[D])
        hidden = 2 * hidden // 3 if self.hidden == "match" else hidden
        return formulas.mlp(values[N], width, hidden, int(values.get(formulas.OUT, width)), gated=True, depthwise=3)


@dataclass(frozen=True)
class TokensToToken:
    """T2T-ViT's stem, with performers or transformers of ``token_dim``."""

    token_dim: int = 64
    performer: bool = True

    def stem(self, site: CountedSite, index: int) -> SiteFormula:
        if _numbers_of_stem(site) != (16, 16):
            raise NotApplicable("its stem makes cells of 16x16 pixels, this one does not")
        channels, out = _stem_channels(site)
        return formulas.tokens_to_token(H, W, channels, out, width_inside=self.token_dim, performer=self.performer)


@dataclass(frozen=True)
class CrossScale:
    """CrossFormer's embedding with ``kernels``; None takes 1, 2, 4 and 8 strides at the stem, 1 and 2 at mergings."""

    kernels: tuple[int, ...] | None = None

    def stem(self, site: CountedSite, index: int) -> SiteFormula:
        assert site.sides is not None
        stride = site.site.stride[0]  # type: ignore[union-attr]
        kernels = self.kernels or tuple(stride * k for k in ((1, 2, 4, 8) if index == 0 else (1, 2)))
        channels, out = _stem_channels(site)
        return formulas.cross_scale_embedding(lambda kernel: site.sides, channels, out, kernels)  # type: ignore


class NotApplicable(Exception):
    """A site that a target does not take; the reason."""


@dataclass(frozen=True)
class TransNeXt(Aggregated, ConvGlu):
    """Aggregated attention and gated MLPs."""


@dataclass(frozen=True)
class Rmt:
    """Manhattan attention, decomposed on maps of more than ``full_tokens`` tokens at the example."""

    full_tokens: int = 196

    def attention(self, site: CountedSite, index: int) -> SiteFormula:
        rows, columns = _numbers(site)
        kind = ManhattanDecomposed if rows * columns > self.full_tokens else Manhattan
        return kind().attention(site, index)


@dataclass(frozen=True)
class CrossFormer(LongShortDistance, CrossScale):
    """Groups of short and long distance, and cross-scale embeddings."""


TARGETS: dict[str, type] = {
    "neighborhood": Neighborhood,
    "dilated_neighborhood": DilatedNeighborhood,
    "aggregated": Aggregated,
    "manhattan": Manhattan,
    "manhattan_decomposed": ManhattanDecomposed,
    "long_short_distance": LongShortDistance,
    "conv_glu": ConvGlu,
    "tokens_to_token": TokensToToken,
    "cross_scale": CrossScale,
    "nat": Neighborhood,
    "dinat": DilatedNeighborhood,
    "transnext": TransNeXt,
    "rmt": Rmt,
    "crossformer": CrossFormer,
    "t2t": TokensToToken,
}
_PARTS = {"SA": "attention", "WSA": "attention", "SRA": "attention", "XA": "attention", "MLP": "mlp", "ConvFFN": "mlp",
          "stem": "stem"}  # fmt: skip


def converted_cost(report: Report, to: str | Target, options: dict[str, Any]) -> Comparison:
    """Before and after a conversion of every site that the target takes.

    Raises:
        ArgumentError: unknown target or option, or no site that it takes.
    """
    name, target = _target(to, options)
    rows, after, notes, index = [], [], [], 0
    for site in report.sites:
        changed, note = _converted(site, target, index)
        index += changed is not None
        after.append(site if changed is None else changed)
        rows.append(ComparedSite(site.name, site, after[-1], site.macs, after[-1].macs, note))
        if note:
            notes.append(f"{site.name or '(root)'} is left as it is: {note}")
    if not index:
        reasons = "; ".join(notes[:3]) or "it has none of that kind"
        raise ArgumentError(f"to: no site of {report.name} can become {name!r} ({reasons})")
    batch, (height, width) = report.batch, report.size
    formula = ModelFormula(
        [_evaluated(site, batch, height, width) for site in after], report.formula.rest, report.formula.rest_once
    )
    rows = [replace(r, after=s, after_macs=s.macs) for r, s in zip(rows, formula.sites, strict=True)]
    if isinstance(target, Aggregated):
        notes.append("the position MLP of aggregated attention is constant at a fixed size and not counted")
    return Comparison((report.name, f'to="{name}"'), report.size, batch, rows, report.formula, formula, notes)


def _target(to: str | Target, options: dict[str, Any]) -> tuple[str, Any]:
    """A target of this table by name and options, or by the settings of a target object that it shares."""
    name = to.name if isinstance(to, Target) else str(to)
    if name not in TARGETS:
        raise ArgumentError(
            f"to: no cost of {name!r} is known{nearest(name, TARGETS)}; known targets: {', '.join(TARGETS)}"
        )
    known = {f.name for f in fields(TARGETS[name])}
    given = {k: v for k, v in vars(to).items() if k in known and v is not None} if isinstance(to, Target) else options
    for option in given:
        if option not in known:
            raise ArgumentError(
                f"to: the cost of {name!r} does not depend on {option!r}{nearest(option, known)}; "
                f"it depends on: {', '.join(sorted(known))}"
            )
    return name, TARGETS[name](**given)


def _converted(site: CountedSite, target: Any, index: int) -> tuple[CountedSite | None, str]:
    """The site after conversion, or None with the reason if the target is for sites of that part at all."""
    part = _PARTS.get(site.kind, "attention" if site.site is not None and site.site.kind == "attention" else "")
    make: Callable[[CountedSite, int], SiteFormula] | None = getattr(target, part, None) if part else None
    if make is None:
        return None, ""
    if site.formula is None:
        return None, "its own cost has no formula"
    try:
        formula = make(site, index)
    except NotApplicable as reason:
        return None, str(reason)
    return replace(site, formula=formula, kind=formula.kind), ""


def _evaluated(site: CountedSite, batch: int, height: int, width: int) -> CountedSite:
    if site.formula is None:
        return site
    return replace(site, macs=site.formula.macs_of(batch, height, width))


def _sides(site: CountedSite) -> Any:
    if site.sides is None:
        raise NotApplicable("its tokens are not known to lie on a map")
    return site.sides


def _prefix(site: CountedSite) -> int:
    return site.site.grid.prefix_tokens if isinstance(site.site, AttentionSite) and site.site.grid else 0


def _widths(site: CountedSite) -> Widths:
    assert site.formula is not None
    values = site.formula.values
    width = int(values[C])
    return Widths(width, int(values[formulas.h]), int(values.get(formulas.A, width)))


def _numbers(site: CountedSite) -> tuple[int, int]:
    assert isinstance(site.site, AttentionSite)
    grid = site.site.map_grid
    return grid.height, grid.width


def _numbers_of_stem(site: CountedSite) -> tuple[int, int]:
    return site.site.stride  # type: ignore[union-attr]


def _stem_channels(site: CountedSite) -> tuple[int, int]:
    return site.site.in_channels, site.site.out_channels  # type: ignore[union-attr]
