"""Spatial reduction undone: keys and values of every token, fitted to those of the reduced map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..certify.forms import operand_heads_last
from ..cores import PixelKeys
from ..errors import Refusal
from ..graph.values import shape_of
from ..ir.contract import RIDGE, BetweenProjections, Conversion, Exactness, Weights
from ..ir.sites import AttentionSite, Global, Operand, Projection, Reduced
from ..numerics.ridge import ridge_of_rows
from .site_geometry import grid_of_site


def on_pixels(
    site: AttentionSite, convert: Callable[[AttentionSite], Conversion], weights: Weights
) -> BetweenProjections:
    """What ``convert`` makes of the site if it were global, with key and value projections of its own.

    Query and output projections stay; the reducer and the old projections of its keys are dropped. The new ones start
    as the old ones, which were trained behind the reducer; ``fitted_to_reduced`` is what makes them useful.
    """
    grid, source = grid_of_site(site), site.nodes.source
    if site.key is None or site.value is None or source is None or site.bias is not None:
        raise Refusal("its reduced keys have a bias or are not a plain projection")
    if grid.prefix_tokens or site.nodes.batch_axis or shape_of(source)[1:-1] != (grid.tokens,):
        raise Refusal("its queries are not exactly the tokens of the map")
    inner = convert(replace(site, keys=Global()))
    assert isinstance(inner, BetweenProjections)
    core = PixelKeys(inner.core, shape_of(source)[-1], site.heads, site.key.head_dim, site.value.head_dim)
    core.to(weights(site.key.weight))
    with torch.no_grad():
        for linear, part in ((core.key, site.key), (core.value, site.value)):
            _copy_rows(linear, part, weights)
    why = "keys and values of every token by the projections of the reduced ones, to be fitted on images"
    why += f"; {inner.why}" if inner.exactness < Exactness.CONTINUOUS else ""
    settings = {**inner.settings, "reduced_keys": "refit"}
    return BetweenProjections(Exactness.PROJECTED, why, core, settings=settings, benefit=inner.benefit)


def fitted_to_reduced(conversion: Conversion, site: AttentionSite, values: Weights) -> Conversion:
    """The new projections by ridge regression: from the tokens of the example to the nearest reduced key and value.

    Softmax attention to keys that are each repeated is attention to the keys, so a perfect fit would keep a dense
    attention's function. The constant is not shrunk.
    """
    projections = conversion.core.projections if isinstance(conversion, BetweenProjections) else None
    if projections is None:
        return conversion
    pixels = values(site.source).flatten(0, 1).double()
    settings = dict(conversion.settings)
    with torch.no_grad():
        for name, linear, operand in zip(
            ("key", "value"), projections, (site.nodes.key, site.nodes.value), strict=True
        ):
            wanted = _upsampled(site, values(operand.node), operand).flatten(2).flatten(0, 1).double()
            slope = ridge_of_rows(pixels - pixels.mean(0), wanted - wanted.mean(0), RIDGE)
            constant = wanted.mean(0) - pixels.mean(0) @ slope
            linear.weight.copy_(slope.T)
            linear.bias.copy_(constant)
            missed = (wanted - pixels @ slope - constant).square().sum() / (wanted - wanted.mean(0)).square().sum()
            settings[f"{name}_r2"] = round(1 - float(missed), 6)
    how = f"fitted to the reduced ones on {len(pixels)} example tokens"
    why = conversion.why.replace("by the projections of the reduced ones, to be fitted on images", how)
    return replace(conversion, why=why, settings=settings)


def _upsampled(site: AttentionSite, value: Tensor, operand: Operand) -> Tensor:
    """``[batch, tokens, heads, dim]`` of the reduced map, for every token that of the cell it lies in."""
    assert isinstance(site.keys, Reduced)
    grid, cells = grid_of_site(site), (site.keys.height, site.keys.width)
    part = operand_heads_last(value, operand, site)
    rows, columns = (
        torch.arange(side, device=value.device) * count // side
        for side, count in zip((grid.height, grid.width), cells, strict=True)
    )
    return part[:, (rows[:, None] * cells[1] + columns).flatten()]


def _copy_rows(linear: nn.Linear, part: Projection, weights: Weights) -> None:
    rows = part.rows.flatten()
    linear.weight.copy_(weights(part.weight)[rows])
    linear.bias.copy_(torch.zeros_like(linear.bias) if part.bias is None else weights(part.bias)[rows])
