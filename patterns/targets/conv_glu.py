"""Convolutional gated linear units in the place of MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...cores.conv_gate import ConvGate, ConvGatedMlp, identity_convolution
from ...errors import NothingToDo, Refusal
from ...graph.values import argument, input_of, operator_name, shape_of
from ...ir.contract import RIDGE, BetweenLinears, Conversion, Exactness, Target, Weights, WholeSite
from ...ir.core import StageCore
from ...ir.sites import Grid, MlpSite, Site, Stage
from ...modules.conv_glu import ConvGLU, gated_width
from ...numerics.ridge import ridge_of_rows
from ..published import Published, adapter_between, require_no_dropout
from ..site_geometry import require_one_of

_WITHOUT_CONVOLUTION = [("activation",), ("gate",), ("gate", "norm")]
_WITH_CONVOLUTION = [("convolution", "activation"), ("activation", "convolution", "activation")]


@dataclass(frozen=True)
class ConvGlu(Target):
    """Convolutional gated linear unit (Shi 2024, TransNeXt): a depthwise convolution before the activation.

    A convolution before the activation (PVT v2) is kept live, and so are a gate's value and what follows it.

    Args:
        hidden: ``"keep"`` keeps the hidden width, and with it the function; ``"match"`` takes two thirds of it, with
            which the unit has as many weights as the MLP had: the units that give most to the result on the example
            input, and the second map refitted there to what the others gave. None is ``"keep"``, and ``"match"`` where
            ``official``.
        official: take the unit as published, ``fc1``, ``dwconv``, ``fc2``, for the whole MLP.
    """

    hidden: str | None = None
    official: bool = False
    name = "conv_glu"
    kinds = ("mlp",)

    def __post_init__(self) -> None:
        require_one_of("official", self.official, (False, True))
        if self.hidden is None:
            object.__setattr__(self, "hidden", "match" if self.official else "keep")
        require_one_of("hidden", self.hidden, ("keep", "match"))

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, MlpSite)
        _require_activation_before_convolution(site)
        thinned = _matched(site, weights) if self._matches(site) else None
        if self.official:
            return _published(site, weights, None if thinned is None else thinned.core)
        return _kept(site, weights) if thinned is None else thinned.conversion(site)

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        assert isinstance(site, MlpSite)
        if not self._matches(site):
            return conversion
        refitted = _refitted(site, weights, values(site.source))
        return _published(site, weights, refitted.core) if self.official else refitted.conversion(site)

    def _matches(self, site: MlpSite) -> bool:
        return self.hidden == "match" and not _gates(site)


def _kept(site: MlpSite, weights: Weights) -> Conversion:
    last = max(number for number, stage in enumerate(site.stages) if stage.kind in ("activation", "gate"))
    stage = site.stages[last]
    if shape_of(stage.node)[:-1] != shape_of(site.source)[:-1] or _is_moved(site):
        raise Refusal("its activation acts on a layout that differs from its input's")
    convolves = _convolves(site)
    grid = None if convolves else _grid_of(site)
    source_dim = None if stage.kind == "gate" else site.width
    gate = ConvGate(stage.name, site.hidden_width, source_dim, not convolves, grid).to(_weight_of(site.first, weights))
    cores: list[StageCore | None] = [None] * len(site.stages)
    cores[last] = gate
    parts = ["its own convolution" if convolves else "an identity convolution"]
    parts += ["its own gate" if source_dim is None else "a value of one"]
    parts += ["its inner norm kept"] if site.stages[-1].kind == "norm" else []
    added = sum(parameter.numel() for parameter in gate.parameters())
    return BetweenLinears(
        Exactness.EXACT,
        f"{stage.name} with {', '.join(parts)}",
        cores,
        settings={"hidden": site.hidden_width},
        benefit=f"none at once: {added} new weights to train",
    )


@dataclass(frozen=True)
class _Thinned:
    """An MLP with the ``kept`` of its hidden units, chosen for ``how``, of which each had ``given`` so much."""

    core: ConvGatedMlp
    given: Tensor
    kept: Tensor
    how: str

    def conversion(self, site: MlpSite) -> WholeSite:
        share = round(float(self.given[self.kept].sum() / self.given.sum()), 6)
        return WholeSite(
            Exactness.PROJECTED,
            f"{len(self.kept)} of {site.hidden_width} hidden units kept, {self.how}",
            self.core,
            settings={"hidden": len(self.kept), "kept_share": share},
            benefit="as many weights as the MLP had",
        )


def _matched(site: MlpSite, weights: Weights) -> _Thinned:
    """The hidden units whose columns of the second map are largest; how active they are, only data would tell."""
    norms = _weight_of(site.second, weights).detach().norm(dim=0)
    kept = _largest(norms, _matched_width(site))
    return _Thinned(_of_kept_units(site, weights, kept), norms.square(), kept, "those the second map weighs most")


def _refitted(site: MlpSite, weights: Weights, source: Tensor) -> _Thinned:
    """The units that give most to the result on ``source``, and the second map refitted to what the others gave.

    With the kept units' values ``a`` and what is lost of the result ``e``, ``e - a d`` is to be small: a ridge towards
    the old columns, so that few tokens move little (CORP, 2026, does this for pruned MLPs).
    """
    second = _weight_of(site.second, weights).detach()
    with torch.no_grad():
        hidden = _of_kept_units(site, weights, torch.arange(site.hidden_width)).hidden(source).flatten(0, -2)
        given = hidden.double().square().mean(0) * second.double().square().sum(0)
        kept = _largest(given, _matched_width(site))
        core = _of_kept_units(site, weights, kept)
        cut = second.clone()
        cut[:, kept] = 0
        ones = hidden.new_ones(len(hidden), 1)
        change = ridge_of_rows(torch.cat([hidden[:, kept], ones], dim=1), hidden @ cut.T, RIDGE).to(second)
        core.fc2.weight.add_(change[:-1].T)
        core.fc2.bias.add_(change[-1])
    how = f"those that give most on {len(hidden)} example tokens, and the second map refitted to the rest"
    return _Thinned(core, given, kept, how)


def _of_kept_units(site: MlpSite, weights: Weights, kept: Tensor) -> ConvGatedMlp:
    """The MLP with some of its hidden units."""
    second = _weight_of(site.second, weights)
    kept = kept.to(second.device)
    rows = site.rows.to(kept.device)[kept]
    pre_activation = site.stages[0].name if len(site.stages) == 3 else "identity"
    core = ConvGatedMlp(
        site.width, len(kept), len(second), site.stages[-1].name, _grid_of(site), pre_activation, _dropout(site)
    ).to(second)
    convolution = next((stage for stage in site.stages if stage.kind == "convolution"), None)
    with torch.no_grad():
        _fill(core.fc1, _weight_of(site.first, weights)[rows], _bias_of(site.first, weights, rows))
        _fill(core.fc2, second[:, kept], _bias_of(site.second, weights, slice(None)))
        if convolution is not None:
            assert core.gate.conv is not None
            taps = _taps(convolution, weights)[kept]
            _fill(core.gate.conv.conv, taps, _bias_of(convolution.call, weights, kept))
    return core


def _matched_width(site: MlpSite) -> int:
    width = gated_width(site.hidden_width)
    if width < 1:
        raise Refusal(f"two thirds of {site.hidden_width} hidden units round to zero", "use hidden='keep'")
    return width


def _largest(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


def _published(site: MlpSite, weights: Weights, thinned: ConvGatedMlp | None) -> Conversion:
    """TransNeXt's unit: hidden units and values are halves of one map."""
    last, third = site.stages[-1], site.stages[0].name if len(site.stages) == 3 else "identity"
    if last.kind == "norm":
        raise Refusal("the published unit has no inner norm", "leave official out")
    require_no_dropout(_dropout(site))
    parts = _kept_parts(site, weights) if thinned is None else _parts_of(thinned)
    first, value, convolution, second = parts
    width = len(first[0])
    made = Published(
        ConvGLU(site.width, width, len(second[0]), activation=last.name, pre_activation=third),
        _weight_of(site.first, weights),
    )
    own = _gates(site)
    for number, kind in enumerate(("weight", "bias")):
        carried = first[number].numel() + (value[number].numel() if own else 0)
        made.carry(f"fc1.{kind}", torch.cat([first[number], value[number]]), carried)
        made.carry(f"dwconv.dwconv.{kind}", convolution[number], convolution[number].numel() if _convolves(site) else 0)
        made.carry(f"fc2.{kind}", second[number])
    return made.conversion(
        Exactness.CONTINUOUS if thinned is None else Exactness.PROJECTED,
        f"{width} of {site.hidden_width} hidden units, "
        + ("its own gate" if own else "a value of one")
        + (", its own convolution" if _convolves(site) else ""),
        settings={"hidden": width},
        benefit="none at once" if thinned is None else "as many weights as the MLP had",
        adapter=adapter_between(site.source, site.result, _grid_of(site)),
    )


Part = tuple[Tensor, Tensor]
"""Weight and bias."""


def _parts_of(core: ConvGatedMlp) -> tuple[Part, ...]:
    """Hidden units, values, convolution and second map."""
    gate = core.gate
    assert gate.value is not None
    assert gate.conv is not None
    made: tuple[Any, ...] = (core.fc1, gate.value, gate.conv.conv, core.fc2)
    return tuple((part.weight.detach(), part.bias.detach()) for part in made)


def _kept_parts(site: MlpSite, weights: Weights) -> tuple[Part, ...]:
    """The same at the donor's own width."""
    first, second = (_part_of(linear, rows, weights) for linear, rows in ((site.first, site.rows), (site.second, None)))
    last, width = site.stages[-1], len(site.rows)
    if last.gate is not None:
        value = _part_of(last.gate, last.rows, weights)
    else:
        value = (torch.zeros_like(first[0]), torch.ones_like(first[1]))
    own = next((stage for stage in site.stages if stage.kind == "convolution"), None)
    if own is not None:
        bias = _bias_of(own.call, weights, slice(None))
        return first, value, (_taps(own, weights), torch.zeros_like(first[1]) if bias is None else bias), second
    identity = identity_convolution(width).conv
    assert identity.bias is not None
    return first, value, (identity.weight.detach(), identity.bias.detach()), second


def _part_of(linear: Node, rows: Tensor | None, weights: Weights) -> Part:
    weight, chosen = _weight_of(linear, weights).detach(), slice(None) if rows is None else rows
    bias = _bias_of(linear, weights, chosen)
    weight = weight[chosen]
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def _convolves(site: MlpSite) -> bool:
    return any(stage.kind == "convolution" for stage in site.stages)


def _require_activation_before_convolution(site: MlpSite) -> None:
    kinds = tuple(stage.kind for stage in site.stages)
    if kinds == ("convolution", "gate"):
        raise NothingToDo("it is a convolutional gated linear unit already")
    if kinds in _WITHOUT_CONVOLUTION or kinds in _WITH_CONVOLUTION:
        return
    between = ", ".join(map(str, site.stages))
    if "norm" in kinds:
        reason = f"a norm between its linear maps ({between}) has no place in a gated unit"
    elif kinds[-1:] == ("convolution",):
        reason = f"its convolution follows its activation ({between}), and a gated unit's comes before it"
    else:
        reason = f"it is no activation between two linear maps but {between}"
    raise Refusal(reason)


def _gates(site: MlpSite) -> bool:
    return any(stage.kind == "gate" for stage in site.stages)


def _grid_of(site: MlpSite) -> Grid | None:
    """The map that a sequence of tokens holds; None where they lie on a map as they are."""
    sides = shape_of(site.source)[1:-1]
    if site.grid is not None and sides == (site.grid.height, site.grid.width):
        return None
    if site.grid is None or sides != (site.grid.tokens,):
        raise Refusal("the positions of its tokens on the map are unknown, and a convolution needs them")
    return site.grid


def _between(site: MlpSite) -> Iterator[Node]:
    """From the second map back to the last stage: what only moves or drops values."""
    node = input_of(site.second)
    while node is not site.stages[-1].node:
        yield node
        node = input_of(node)


def _is_moved(site: MlpSite) -> bool:
    return any(operator_name(node) not in ("aten::dropout", "aten::clone") for node in _between(site))


def _dropout(site: MlpSite) -> float:
    rates = (float(argument(node, 1)) for node in _between(site) if operator_name(node) == "aten::dropout")
    return max(rates, default=0.0)


def _taps(stage: Stage, weights: Weights) -> Tensor:
    """``[channels, 1, 3, 3]`` of a ConvFFN's convolution; one that is added to its operand holds that in its center."""
    taps = weights(input_of(stage.call, 1))
    if taps.shape[-2:] != (3, 3) or shape_of(stage.node) != shape_of(stage.before):
        raise Refusal(
            f"its convolution is {taps.shape[-2]}x{taps.shape[-1]} from {stage.before.meta['val'].shape[-2:]} to "
            f"{stage.grid}, not 3x3 on the same map",
            "use hidden='keep', which leaves it as it is",
        )
    return taps if stage.added is None else taps + identity_convolution(len(taps)).conv.weight.detach().to(taps)


def _weight_of(linear: Node, weights: Weights) -> Tensor:
    return weights(input_of(linear, 1))


def _bias_of(node: Node, weights: Weights, rows: Tensor | slice) -> Tensor | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return weights(bias)[rows] if isinstance(bias, Node) else None


def _fill(module: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    module.weight.copy_(weight)
    assert module.bias is not None
    module.bias.copy_(torch.zeros_like(module.bias) if bias is None else bias)
