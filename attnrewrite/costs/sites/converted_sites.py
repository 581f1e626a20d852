"""The formula that a site would have after a conversion, from the core that its target would install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sympy import Expr
from torch import nn
from torch.fx import Node

from ...algebra import formulas
from ...algebra.core_formula import CoreSizes, core_formula
from ...algebra.module_formula import costed_module
from ...algebra.site_formula import PADDED, ZERO, A, C, N, P, SiteFormula, Widths, h
from ...algebra.symbols import H, W
from ...cores import Activation, GatherPatches, MapToTokens
from ...cores.conv_gate import ConvGate, ConvGatedMlp
from ...cores.cross_scale import CrossScaleConv, CrossScalePatches
from ...graph.values import shape_of
from ...ir.contract import BetweenProjections, Conversion, WholeSite
from ...ir.core import Operands
from ...ir.sites import AttentionSite, MapGroups, MlpSite, Projection, Site, StemSite
from ...modules.conv_glu import ConvGLU
from ...modules.cross_scale import CrossScaleMerge, CrossScaleStem
from .candidates import mlp_form
from .counted_site import CountedSite


def converted_formula(counted: CountedSite, conversion: Conversion) -> SiteFormula | None:
    """None where the site, or what takes its place, has no formula."""
    site = counted.site
    if counted.formula is None or not isinstance(site, Site):
        return None
    return _KINDS[type(site)](counted, site, counted.formula, conversion)


def _attention(
    counted: CountedSite, site: AttentionSite, before: SiteFormula, conversion: Conversion
) -> SiteFormula | None:
    """The new core between the site's own projections, which act on the map itself where they acted on windows."""
    values = before.values
    windowed = isinstance(site.keys, MapGroups)
    if isinstance(conversion, WholeSite):
        return _published(counted, site, conversion.core)
    assert isinstance(conversion, BetweenProjections)
    if windowed and counted.sides is None:
        return None
    queries = counted.sides[0] * counted.sides[1] if windowed and counted.sides else values[N]
    keys = queries if windowed else values.get(P, queries)
    width = int(values[C])
    widths = Widths(width, int(values[h]), int(values.get(A, width)))
    core = core_formula(conversion.core, CoreSizes(queries, keys, counted.sides, widths))
    if core is None:
        return None
    parts = {name: getattr(before, name).subs(PADDED, N) for name in ("dense", "streams", "weights")}
    known = {name: value for name, value in values.items() if name is not PADDED and name not in core.values}
    made = core.plus(known, saved=C * N, **parts)
    if conversion.core.padded is not None:
        made = made.plus(once=_projections(site, site.key, site.value))
    if conversion.core.operands is not Operands.KEYS:
        made = made.plus(dense=N * _projections(site, site.key, site.value))
    return made


def _published(counted: CountedSite, site: AttentionSite, module: nn.Module) -> SiteFormula | None:
    """A paper's module in the place of the whole site."""
    costed = costed_module(module)
    if costed is None or counted.sides is None or (site.grid is not None and site.grid.prefix_tokens):
        return None
    return costed.formula(*counted.sides)


def _projections(site: AttentionSite, *parts: Projection | None) -> Expr:
    """MACs a token of the linear maps that hold ``parts``, each map once."""
    held = {part.weight for part in parts if part is not None}
    maps = dict.fromkeys(linear for linear in site.nodes.linears if linear.args[1] in held)
    return sum((C * shape_of(linear)[-1] for linear in maps), ZERO)


def _mlp(counted: CountedSite, site: MlpSite, before: SiteFormula, conversion: Conversion) -> SiteFormula | None:
    core, out = conversion.core if isinstance(conversion, WholeSite) else None, shape_of(site.second)[-1]
    if type(core) is ConvGLU:
        hidden = core.fc1.out_features // 2
        return formulas.mlp(before.values[N], site.width, hidden, out, gated=True, depthwise=3)
    if type(core) is ConvGatedMlp:
        return formulas.mlp(
            before.values[N], site.width, core.fc1.out_features, out, gated=True, depthwise=_side_of(core.gate)
        )
    parts = conversion.modules
    if not all(type(part) in (Activation, ConvGate) for part in parts):
        return None
    gated, kernel = mlp_form(site)
    for gate in (part for part in parts if type(part) is ConvGate):
        gated, kernel = gated or gate.value is not None, kernel or _side_of(gate)
    return formulas.mlp(before.values[N], site.width, site.hidden_width, out, gated=gated, depthwise=kernel)


def _side_of(gate: ConvGate) -> int:
    return 0 if gate.conv is None else gate.conv.conv.kernel_size[0]


def _stem(counted: CountedSite, site: StemSite, before: SiteFormula, conversion: Conversion) -> SiteFormula | None:
    (core,) = conversion.modules
    if type(core) in (MapToTokens, GatherPatches):
        return before
    if type(core) in (CrossScaleConv, CrossScalePatches, CrossScaleStem):
        return _cross_scale(counted, site, core.projs)
    if type(core) is CrossScaleMerge:
        return _cross_scale(counted, site, core.reductions)
    costed = costed_module(core)
    if costed is not None and _is_image(site.source):
        made = costed.formula(H, W)
        return made if made is None or isinstance(conversion, WholeSite) else _beside(made, before)
    return None


def _cross_scale(counted: CountedSite, site: StemSite, convs: Any) -> SiteFormula | None:
    """Every scale makes the map that the convolution made, as long as that loses no row to its kernel."""
    if counted.sides is None or 2 * site.padding[0] + site.stride[0] < site.kernel[0]:
        return None
    sides = counted.sides
    return formulas.cross_scale_embedding(
        lambda kernel: sides, convs[0].in_channels, site.out_channels, [conv.kernel_size[0] for conv in convs]
    )


def _beside(made: SiteFormula, kept: SiteFormula) -> SiteFormula:
    """Both at once; symbols of the kept one that have another value in the new one are replaced by their values."""
    clashing = {name: value for name, value in kept.values.items() if made.values.get(name, value) != value}
    values: dict[Any, Any] = {name: value for name, value in kept.values.items() if name not in clashing}
    return made.plus(
        values, **{name: getattr(kept, name).subs(clashing, simultaneous=True) for name in ("dense", "core", "once")}
    )


def _is_image(node: Node) -> bool:
    return node.op == "placeholder"


_KINDS: dict[type, Callable[[CountedSite, Any, SiteFormula, Conversion], SiteFormula | None]] = {
    AttentionSite: _attention,
    MlpSite: _mlp,
    StemSite: _stem,
}


def core_name(conversion: Conversion) -> str:
    """Of what takes a site's place, for notes."""
    return ", ".join(sorted({type(core).__name__ for core in conversion.modules})) or "nothing"
