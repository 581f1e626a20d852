"""Translation validation: a site is accepted only if its data, evaluated, reproduces the captured subgraph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..errors import UNFORESEEN, first_line
from ..graph.dataflow import Dataflow
from ..graph.values import Values, evaluate, shape_of
from ..ir.sites import AttentionSite, HeadNorm, Site
from ..lift.query_key_norm import probe_vectors
from ..numerics.draws import same_draws
from ..numerics.error import relative_error, worst
from . import forms
from .attention import AttentionCheck
from .ends import inputs_of, wanted_nodes
from .maps import MapCheck
from .run import collect_values, run_through

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Largest error relative to the largest value. Float32 leaves room for another order of summation."""

_DOUBLE_WORK = 200e6
"""Multiplications in a site's maps and products up to which its random check is in float64; beyond, in the model's
dtype."""


@dataclass(frozen=True)
class Certificate:
    """Relative errors (largest difference over largest value) of a site's form on two inputs.

    ``random`` is measured on Gaussian input, in ``random_dtype`` (float64 unless the site is very large), ``captured``
    in the model's dtype on the values that the example input gave. A NaN never passes. ``sampled`` says on which part
    of an attention's queries, where there are too many for all of them; operands and projection are certified on all
    tokens of the random input.
    """

    random: float
    captured: float
    dtype: torch.dtype
    random_dtype: torch.dtype = torch.float64
    reason: str = ""
    sampled: str = ""

    @property
    def passed(self) -> bool:
        within = self.random <= TOLERANCE[self.random_dtype] and self.captured <= TOLERANCE[self.dtype]
        return within and not self.reason

    def __str__(self) -> str:
        error, sample = max(self.random, self.captured), f" on {self.sampled}" if self.sampled else ""
        if self.passed:
            return f"certified {error:.0e}{sample}"
        return f"not certified ({self.reason or f'error {error:.0e}'}{sample})"


def certify(site: Site, flow: Dataflow, captured: Values) -> Certificate:
    """Evaluate ``site``'s form and the captured subgraph on random and on captured inputs and compare.

    Args:
        captured: values of the nodes that ``wanted_nodes`` names, from one run on the example input.
    """
    dtype = captured[inputs_of(site)[0]].dtype
    dtype = dtype if dtype in TOLERANCE else torch.float64
    nothing = float("nan")
    try:
        check = AttentionCheck(site, flow) if isinstance(site, AttentionSite) else MapCheck(site, flow)
        if check.misplaced:
            return Certificate(nothing, nothing, dtype, reason=check.misplaced)
        random_dtype = torch.float64 if check.work <= _DOUBLE_WORK else dtype
        random_error, captured_error = check.random_error(random_dtype), check.captured_error(captured, dtype)
        norms = (site.query_norm, site.key_norm) if isinstance(site, AttentionSite) else ()
        random_error = worst(random_error, *(_norm_error(norm, flow) for norm in norms if norm is not None))
    except UNFORESEEN as cause:
        return Certificate(nothing, nothing, dtype, reason=f"its form does not run: {first_line(cause)}")
    return Certificate(random_error, captured_error, dtype, random_dtype, sampled=check.sampled)


def certify_running(
    sites: Sequence[Site], flow: Dataflow, kept: set[Node], certified: Callable[[int, Certificate, Values], None]
) -> Values:
    """Certify ``sites`` during one run of the captured graph, each as soon as its values are known.

    ``certified`` is told the place in ``sites``, the certificate, and the values that it was certified on. These are
    dropped as soon as no site needs them, but for those of the nodes in ``kept``, which are returned.
    """
    wanted = [wanted_nodes([site]) for site in sites]
    missing = [set(nodes) for nodes in wanted]
    needing = Counter(node for nodes in wanted for node in nodes) + Counter(kept)
    of_node: dict[Node, list[int]] = {}
    for place, nodes in enumerate(wanted):
        for node in nodes:
            of_node.setdefault(node, []).append(place)
    values: Values = {}

    def found(node: Node, value: Any) -> None:
        values[node] = value
        for place in of_node.get(node, ()):
            missing[place].discard(node)
            if missing[place]:
                continue
            with same_draws(flow.capture.tensors.values()):  # the run goes on with its own
                certified(place, certify(sites[place], flow, values), values)
            needing.subtract(wanted[place])
            for used in wanted[place]:
                if not needing[used]:
                    del values[used]

    run_through(flow, set(needing), found)
    return values


def _norm_error(norm: HeadNorm, flow: Dataflow) -> float:
    """A norm alone on head vectors of all magnitudes: eps is invisible at Gaussian magnitudes."""
    given = probe_vectors(norm.vectors, shape_of(norm.source), (-16.0, 3.0)).to(norm.source.meta["val"].device)
    made = evaluate([norm.node], {norm.source: given}, flow.capture, flow.constants, torch.float64)[norm.node]
    actual = forms.normalized(given.flatten()[norm.vectors], norm, lambda node: flow.constants[node].double())
    return relative_error(actual, made.flatten()[norm.vectors])


__all__ = [
    "TOLERANCE", "Certificate", "certify", "certify_running", "collect_values", "relative_error", "wanted_nodes",
]  # fmt: skip
