"""A planned site as a row of the report."""

from __future__ import annotations

from dataclasses import replace

from ..graph.dataflow import Dataflow
from ..ir.contract import Conversion, WholeSite
from ..ir.sites import Site, StemSite
from ..reports.conversion import SiteReport
from .planned_site import PlannedSite
from .reading import NONE, PREFIX


def site_report(planned: PlannedSite, flow: Dataflow, lost: dict[int, int], read: str) -> SiteReport:
    """``lost`` are the sizes, by identity, of parameters that its module loses; ``read`` as ``read_tokens`` says."""
    site, conversion = planned.site, planned.conversion
    certificate = str(planned.certificate) if planned.certificate else ""
    grid = "" if isinstance(site, StemSite) or site.grid is None else str(site.grid)
    row = SiteReport(
        site.name, site.kind, site.describe(), status_of(planned), why=planned.why, certificate=certificate, grid=grid,
        read=read, dead=read == NONE or (read == PREFIX and planned.converting and planned.keeps_prefix),
    )  # fmt: skip
    if conversion is None or not planned.converting:
        return row
    return replace(
        row,
        target=str(planned.target),
        exactness=conversion.exactness.name,
        why=conversion.why,
        benefit=conversion.benefit,
        settings=dict(conversion.settings),
        parameters=_parameters(site, conversion, flow, lost),
        **planned.measured,
    )


def status_of(planned: PlannedSite) -> str:
    """As reports say it, of what is done."""
    return "converted" if planned.converting else planned.status


def _parameters(site: Site, conversion: Conversion, flow: Dataflow, lost: dict[int, int]) -> dict[str, int]:
    """How many serve as before or in another place, are new, and are not used any more; ``lost`` were taken out."""
    new = {id(parameter): parameter.numel() for part in conversion.modules for parameter in part.parameters()}
    tensors = [flow.weights(flow.provenance_of_constant(node)) for node in site.weights()]
    own = {id(tensor): tensor.numel() for tensor in tensors}
    kept = sum(count for key, count in own.items() if key not in lost)
    carried = conversion.carried if isinstance(conversion, WholeSite) else 0
    return {
        "moved": kept + carried, "new": sum(new.values()) - carried, "dropped": max(0, sum(lost.values()) - carried)
    }  # fmt: skip
