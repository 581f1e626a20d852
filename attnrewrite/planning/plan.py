"""A plan: which sites become what, as data. ``apply`` matches nothing and decides nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import Capture, NodeRef
from ..capture.ambient import plain_modes
from ..capture.replica import independent, replica
from ..certify.certificate import relative_error
from ..errors import UNFORESEEN, ArgumentError, AttnRewriteError, ConversionError, ConversionWarning, first_line
from ..graph.dataflow import Dataflow
from ..graph.values import Values
from ..ir.contract import Exactness, WholeSite
from ..ir.sites import AttentionSite, Refused, StemSite, line
from ..lift.looks import Looks
from ..numerics.draws import same_draws
from ..reports.conversion import ConversionReport, SiteReport, suggestion
from ..rewrite.attention_weights import Unavailable
from ..rewrite.image_sides import forget_images, note_images
from ..rewrite.owners import OwnerProgram, build_programs
from ..rewrite.rewritten import restore_module
from ..rewrite.saved_state import forget_loading, watch_loading
from .places import Place, find_places
from .planned_site import PlannedSite
from .reading import NONE, PREFIX, TOLD, read_tokens

END_TO_END = {torch.float64: 1e-6, torch.float32: 1e-3}
"""What an exact conversion may move the output by; half precision: 5e-2. Certification is far stricter;
models that cast to float32 inside move by 1e-7 in float64."""


_TOLD = ("attnrewrite_report", "attnrewrite_places")
"""Attributes of a converted model."""

_OF_ROUNDING = 8
"""How many times the rounding of its original an exact conversion may differ by: it rounds as often, elsewhere."""

_BISECT = "bisect with max_rewrites=, then exclude the site with keep="

_TELLING = 0.1
"""An error that is larger says nothing any more, whatever the original rounds."""


@dataclass
class Plan:
    """What ``apply`` will do to ``model``; ``drop`` and ``limit`` edit it. ``print`` shows it.

    ``refused`` are places that looked like sites and could not be lifted; ``looks`` what the model is at other sizes;
    ``values`` what the example input gave; ``keeps`` by the path of a rewritten module the attributes that its own
    forward sets for others to read, and the new one does not.
    """

    model: nn.Module
    flow: Dataflow
    sites: list[PlannedSite]
    refused: list[Refused]
    looks: Looks | None = None
    programs: list[OwnerProgram] = field(default_factory=list)
    values: Values = field(repr=False, default_factory=dict)
    keeps: dict[str, list[str]] = field(default_factory=dict)
    _weights: list[tuple[int, int]] = field(repr=False, init=False)

    def __post_init__(self) -> None:
        self._weights = _versions(self.model)

    @property
    def capture(self) -> Capture:
        return self.flow.capture

    @property
    def converting(self) -> list[PlannedSite]:
        return [planned for planned in self.sites if planned.status == "convert"]

    @cached_property
    def read(self) -> dict[int, str]:
        """By ``id`` of a site: which of its tokens reach an output, as ``read_tokens`` says."""
        sites = [planned.site for planned in self.sites]
        return dict(zip(map(id, sites), read_tokens(self.flow, sites), strict=True))

    @property
    def places(self) -> list[Place]:
        """Where what is planned can be calibrated, once it is done."""
        return find_places(self.flow, self.sites, self.programs)

    def drop(self, *globs: str) -> Plan:
        """Leave sites alone after all; returns the plan."""
        for glob in globs:
            for planned in matching(glob, self.sites, "drop"):
                if planned.status == "convert":
                    planned.keep("dropped from the plan")
        self.build()
        return self

    def limit(self, max_rewrites: int) -> Plan:
        """Keep the first ``max_rewrites`` conversions only: a wrong result can be bisected to the guilty one."""
        if type(max_rewrites) is not int:
            raise ArgumentError(f"max_rewrites: expected a number, got {max_rewrites!r}")
        if max_rewrites < 0:
            raise ArgumentError(f"max_rewrites: must not be negative, got {max_rewrites}")
        for planned in self.converting[max_rewrites:]:
            planned.keep(f"max_rewrites={max_rewrites}")
        self.build()
        return self

    def apply(self, inplace: bool = False) -> nn.Module:
        """The converted model: a copy, or with ``inplace`` the model itself. A failure leaves the model as it was.

        The model may have been given other weights since the plan was made, but not another structure.
        """
        if not self.converting:
            raise ConversionError(f"nothing to convert in {type(self.model).__name__}:\n{self}")
        for owner in self.programs:
            if type(owner.call.module) is not owner.donor_class:
                raise ConversionError(
                    f"{owner.path or '(root)'} was rewritten since the plan was made; revert the model, or plan anew"
                )
        self._tell_of_kept_values()
        with plain_modes():
            model = self.model if inplace else independent(self.model)
        with _all_or_nothing(model), plain_modes():
            expected = self._expected()
            names = {id(planned.site): planned.target.name for planned in self.converting if planned.target is not None}
            for owner in self.programs:
                owner.install(model.get_submodule(owner.path), {names[id(site)] for site in owner.sites})
            if self.looks is not None and any(owner.reads_image for owner in self.programs):
                note_images(model, self.capture, self.looks.size)
            error = self._output_error(model, expected)
            if self.looks is not None:
                self.looks.size.forget()
            watch_loading(model)
            model.attnrewrite_report = self.report(error)  # type: ignore[assignment]  # an attribute of its own
            model.attnrewrite_places = self.places  # type: ignore[assignment]  # an attribute of its own
        return model

    def report(self, output_error: float | None = None) -> ConversionReport:
        """What is planned, as a report; ``output_error`` is known after ``apply``."""
        lost = {id(site): owner.lost for owner in self.programs for site in owner.sites}
        rows = [
            _row(planned, self.flow, lost.get(id(planned.site), {}), self.read[id(planned.site)])
            for planned in self.sites
        ]
        rows += [SiteReport(r.name, r.kind, "", "refused", why=r.reason) for r in self.refused]
        inputs = (self.capture.tensors[node] for node in self.capture.inputs)
        shapes = [list(value.shape) for value in inputs if isinstance(value, Tensor)]
        tied = [
            f"{owner.path or '(root)'} ({', '.join(sorted(set(owner.fixed_to)))})"
            for owner in self.programs
            if owner.fixed_to
        ]
        return ConversionReport(type(self.model).__name__, shapes, rows, output_error, tied)

    def __str__(self) -> str:
        rows = [
            line(i, planned.site, planned.certificate) + TOLD[self.read[id(planned.site)]] + _fate(planned)
            for i, planned in enumerate(self.sites)
        ]
        rows += [f"refused {site.kind} @ {site.name or '(root)'}: {site.reason}" for site in self.refused]
        return "\n".join(rows)

    def build(self) -> None:
        """Make the programs of the sites that are to be converted; those that cannot be rewritten are refused."""
        conversions = {id(p.site): p.conversion for p in self.converting if p.conversion is not None}
        sites = [planned.site for planned in self.converting]
        assert self.looks is not None, "a plan is built after other looks at the model"
        self.programs, failed = build_programs(sites, self.looks, lambda site: conversions[id(site)])
        reasons = {id(site): reason for site, reason in failed}
        for planned in self.converting:
            if id(planned.site) in reasons:
                planned.refuse(reasons[id(planned.site)])

    def _tell_of_kept_values(self) -> None:
        paths = [owner.path for owner in self.programs if owner.path in self.keeps]
        keeping = [f"{path or '(root)'} ({', '.join(self.keeps[path])})" for path in paths]
        if keeping:
            warnings.warn(
                "rewritten modules do not set the attributes in which their originals keep what they computed: "
                f"{', '.join(keeping)}; what is there now is of an earlier run. Exclude these sites with keep=, or "
                "read the values with a hook on a module that is still called",
                ConversionWarning,
                stacklevel=3,
            )

    def _expected(self) -> list[Tensor]:
        """The model's own outputs on the example input: seen at planning, unless its weights are others now."""
        if _versions(self.model) != self._weights:
            return _outputs(self.model, *self.capture.example)
        return [self.values[node] for node in self._output_nodes]

    @property
    def _output_nodes(self) -> list[Node]:
        references = [leaf for leaf in tree_leaves(self.capture.root.output) if isinstance(leaf, NodeRef)]
        return [reference.node for reference in references if reference.node is not None]

    @property
    def _attention_weights(self) -> set[Node]:
        """Those that new operators have others for: how far they are from the old says nothing of the results."""
        sites = [planned.site for planned in self.converting]
        return {s.nodes.weights.node for s in sites if isinstance(s, AttentionSite) and s.nodes.weights is not None}

    def _output_error(self, model: nn.Module, expected: list[Tensor]) -> float:
        """Relative error of the outputs on the example input; an exact conversion must not change them.

        Raises:
            ConversionError: it did.
        """
        actual = _outputs(model, *self.capture.example)
        exact = all(p.conversion.exactness is Exactness.EXACT for p in self.converting if p.conversion)
        shown = [exact or node not in self._attention_weights for node in self._output_nodes]
        pairs = [(a, e) for a, e, compared in zip(actual, expected, shown, strict=True) if compared]
        error = max((relative_error(a.double(), e.double()) for a, e in pairs if isinstance(a, Tensor)), default=0.0)
        if exact and not error <= END_TO_END.get(expected[0].dtype, 5e-2):
            floor = self._rounding(expected)
            if not error <= min(_OF_ROUNDING * floor, _TELLING):
                raise ConversionError(
                    f"the converted {type(model).__name__} differs from the original by {error:.1e}, whose own outputs "
                    f"are rounded to {floor:.0e}, although every conversion is exact; the model was left as it "
                    f"was; {_BISECT}"
                )
        return error

    def _rounding(self, expected: list[Any]) -> float:
        """How far the model's own outputs are from those that it gives in float64: an ill-conditioned one rounds much.
        Nothing is known of one that does not run in it."""
        args, kwargs = tree_map(_doubled, self.capture.example)
        try:
            exact = _outputs(independent(self.model).double(), args, kwargs)
        except Exception:  # a dtype of its own in its code
            return 0.0
        pairs = zip(expected, exact, strict=True)
        return max((relative_error(e.double(), a) for e, a in pairs if isinstance(e, Tensor)), default=0.0)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where rewriting ``model`` does not come to its end, whatever stopped it, everything is as it was before."""
    before = {module: vars(module).get("attnrewrite_rewriting") for module in model.modules()}
    told = {name: vars(model)[name] for name in _TOLD if name in vars(model)}
    try:
        yield
    except BaseException as cause:
        for module, rewriting in before.items():
            while vars(module).get("attnrewrite_rewriting") is not rewriting:
                restore_module(module)
        if all(rewriting is None for rewriting in before.values()):
            forget_images(model)
            forget_loading(model)
        for name in _TOLD:
            vars(model).pop(name, None)
        vars(model).update(told)
        if isinstance(cause, UNFORESEEN) and not isinstance(cause, AttnRewriteError):
            raise ConversionError(
                f"the converted {type(model).__name__} does not run ({first_line(cause)}); the model was left as it "
                f"was; {_BISECT}"
            ) from cause
        raise


def matching(glob: str, sites: list[PlannedSite], argument: str) -> list[PlannedSite]:
    """Sites whose name matches ``glob``.

    Raises:
        ArgumentError: none does; the nearest names are suggested.
    """
    found = [planned for planned in sites if fnmatchcase(planned.site.name, glob)]
    if not found:
        names = [planned.site.name for planned in sites]
        raise ArgumentError(f"{argument}: {glob!r} matches no site{suggestion(glob, names)}")
    return found


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Changes when a parameter or buffer is exchanged or written to."""
    return [(id(value), value._version) for value in (*model.parameters(), *model.buffers())]


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    with torch.no_grad(), same_draws(model):
        output = replica(model, training=False, own_buffers=True)(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor | Unavailable)]


def _row(planned: PlannedSite, flow: Dataflow, lost: dict[int, int], read: str) -> SiteReport:
    site, conversion = planned.site, planned.conversion
    status = "converted" if planned.status == "convert" else planned.status
    certificate = str(planned.certificate) if planned.certificate else ""
    grid = "" if isinstance(site, StemSite) or site.grid is None else str(site.grid)
    row = SiteReport(
        site.name, site.kind, site.describe(), status, why=planned.why, certificate=certificate, grid=grid, read=read,
        dead=read == NONE or (read == PREFIX and planned.status == "convert" and planned.keeps_prefix),
    )  # fmt: skip
    if conversion is None or planned.status != "convert":
        return row
    return replace(
        row,
        target=str(planned.target),
        exactness=conversion.exactness.name,
        why=conversion.why,
        benefit=conversion.benefit,
        settings=dict(conversion.settings),
        parameters=_parameters(planned, flow, lost),
        **planned.measured,
    )


def _parameters(planned: PlannedSite, flow: Dataflow, lost: dict[int, int]) -> dict[str, int]:
    """How many serve as before or in another place, are new, and are not used any more; ``lost`` were taken out."""
    assert planned.conversion is not None
    conversion = planned.conversion
    new = {id(parameter): parameter.numel() for part in conversion.modules for parameter in part.parameters()}
    tensors = [flow.weights(flow.provenance_of_constant(node)) for node in planned.site.weights()]
    own = {id(tensor): tensor.numel() for tensor in tensors}
    kept = sum(count for key, count in own.items() if key not in lost)
    carried = conversion.carried if isinstance(conversion, WholeSite) else 0
    return {
        "moved": kept + carried, "new": sum(new.values()) - carried, "dropped": max(0, sum(lost.values()) - carried)
    }  # fmt: skip


def _fate(planned: PlannedSite) -> str:
    if planned.status == "convert" and planned.conversion is not None:
        return f"   -> {planned.target} {planned.conversion.exactness.name}: {planned.conversion.why}"
    return f"   {planned.status}: {planned.told}" if planned.why else ""
