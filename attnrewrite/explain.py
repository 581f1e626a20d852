"""What a model is made of: its sites with their proofs, and what each could become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .capture.ambient import plain_modes
from .capture.draws import Stream
from .ir import Site, line
from .lift.dataflow import Dataflow
from .plan import Plan
from .planning import lifted, prove
from .reading import TOLD
from .targets import NotConvertible, known_targets


@dataclass(frozen=True)
class Explanation:
    """The site IR of a model. ``str`` prints one line a site, its certificate, and its possible conversions."""

    plan: Plan
    targets: list[dict[str, str]]

    def __str__(self) -> str:
        rows = []
        for index, (planned, options) in enumerate(zip(self.plan.sites, self.targets, strict=True)):
            rows.append(line(index, planned.site, planned.certificate) + TOLD[self.plan.read[id(planned.site)]])
            rows += [f"      {name}: {text}" for name, text in options.items()]
        rows += [f"refused {r.kind} @ {r.name or '(root)'}: {r.reason}" for r in self.plan.refused]
        return "\n".join(rows) if rows else "no attention, MLP or stem recognised"


@plain_modes()
def explain(model: nn.Module, example_inputs: Any | None = None) -> Explanation:
    """Lift and certify every site of ``model`` and say what each could become, in which class.

    Targets are asked with their default options. The model is not changed.

    Raises:
        ArgumentError: not a module, or example inputs that it does not take.
        CaptureError: the model cannot be exported.
    """
    made, flow = lifted(model, example_inputs)
    prove(made, made.sites, flow, progress=False)
    with Stream().drawn_from():
        return Explanation(made, [_options(planned.site, flow) for planned in made.sites])


def _options(site: Site, flow: Dataflow) -> dict[str, str]:
    options = {}
    for name, kind in sorted(known_targets().items()):
        if name == "identity" or site.kind not in kind.kinds:
            continue
        try:
            conversion = kind().convert(site, 0, flow.weights)
            options[name] = f"{conversion.exactness.name}: {conversion.why}"
        except NotConvertible as reason:
            options[name] = f"refused: {reason}"
    return options
