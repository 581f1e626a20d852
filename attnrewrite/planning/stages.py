"""The stages of a plan, each a function from a plan to the next: look around, choose, prove. Others are the plan's own
``build`` and ``limit``, ``checks`` and ``count_products``. The model is not changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..capture import Capture, capture, further_looks, other_looks, same_size_looks
from ..capture.ambient import plain_modes
from ..certify import Certificate, certify_running
from ..cores.exactness import hold_exact
from ..errors import UNFORESEEN, ArgumentError, ConversionError, NothingToDo, Refusal
from ..graph.dataflow import Dataflow
from ..graph.values import Values
from ..ir.contract import Conversion, Exactness, Target, exactness_of
from ..ir.sites import AttentionSite, Refused, Site
from ..lift.looks import Looks, Seen
from ..numerics.draws import Stream
from .checks import check_behavior, check_training
from .donor import Donor, nodes_of
from .measurement import measure, value_of
from .plan import Plan, Wish, matching
from .planned_site import PlannedSite
from .product_cost import count_products
from .registry import recognize_all, target_of

Selector = str | Iterable[str] | Callable[[Site], bool]
"""Sites by a glob of their names, by several, or by a predicate."""

To = str | Target | Mapping[str, str | Target]
"""A target by its name, a target object, or a mapping from globs of sites' names to either."""

Settle = Callable[[PlannedSite, Values], PlannedSite]
"""What is made of a certified site, while the values that it was certified on are there."""


def planned(
    model: nn.Module, example_inputs: Any | None, to: To, options: dict[str, Any], *, sites: Selector | None,
    keep: Selector | None, fidelity: str, max_rewrites: int | None, progress: bool,
) -> Plan:  # fmt: skip
    """Decide, certify and measure a conversion without changing the model; arguments and errors as for ``convert``."""
    wish = _wish(to, fidelity, options)
    plan = choose(look_around(lifted(model, example_inputs)), wish, sites, keep)
    flow, indices, new_weights = plan.flow, _Indices(), Stream()

    def settle(site: PlannedSite, values: Values) -> PlannedSite:
        with new_weights.drawn_from():
            site = indices.classify(site, wish.fidelity, flow)
            return measure(fit(site, flow, values), flow, values) if site.converting else site

    plan = prove(plan, targeted(plan), progress, settle).build()
    return checked(plan if max_rewrites is None else plan.limit(max_rewrites))


def checked(plan: Plan) -> Plan:
    """The plan without what is another function once it is rewritten, and without the values that this was seen on."""
    plan = count_products(check_behavior(check_training(plan)))
    return replace(plan, values={node: plan.values[node] for node in plan.donor.output_nodes})  # the rest is memory


def decided(plan: Plan, to: Any, fidelity: str, options: dict[str, Any]) -> Plan:
    """What ``planned`` would convert of what was lifted, where nothing is certified, rewritten or run. Arguments and
    errors as for ``convert``."""
    wish = _wish(to, fidelity, options)
    untouched = replace(plan, sites=tuple(PlannedSite(each.site) for each in plan.sites))
    chosen, indices = choose(untouched, wish, None, None), _Indices()
    with Stream().drawn_from():
        return replace(
            chosen,
            sites=tuple(
                indices.classify(each, wish.fidelity, plan.flow) if each.target is not None else each
                for each in chosen.sites
            ),
        )


@plain_modes()
def lifted(model: nn.Module, example_inputs: Any | None) -> Plan:
    """Everything recognized in ``model``, with nothing decided yet."""
    donor = Donor.of(capture(model, example_inputs))
    found = recognize_all(donor.flow)
    refused = tuple(site for site in found if isinstance(site, Refused))
    return Plan(donor, tuple(map(PlannedSite, _sites(found))), refused)


def _sites(found: list[Site | Refused]) -> list[Site]:
    return [site for site in found if not isinstance(site, Refused)]


def look_around(plan: Plan) -> Plan:
    """Look at the model at other sizes; its sites are then what all looks say of them."""

    def seen(look: Capture) -> Seen | None:
        try:
            flow = Dataflow(look)
            return flow, _sites(recognize_all(flow))
        except UNFORESEEN:  # shapes alone were traced: on values, such as an index beyond a table, it does not run
            return None

    def all_seen(looks: list[Capture]) -> list[Seen]:
        return [found for look in looks if (found := seen(look)) is not None]

    looks = Looks(
        plan.flow,
        [each.site for each in plan.sites],
        all_seen(other_looks(plan.capture)) if plan.sites else [],
        lambda: all_seen(same_size_looks(plan.capture)),
        lambda: all_seen(further_looks(plan.capture)),
    )
    if plan.sites and not looks.others:
        _ = looks.other_batches  # wanted for every module then, and no values take memory yet
    sites = tuple(replace(each, site=site) for each, site in zip(plan.sites, looks.sites, strict=True))
    return replace(plan, donor=replace(plan.donor, looks=looks), sites=sites)


def _wish(to: Any, fidelity: str, options: dict[str, Any]) -> Wish:
    """Targets by site glob; first match wins."""
    least = exactness_of(fidelity, "fidelity")
    if not isinstance(to, Mapping):
        return Wish({"*": target_of(to, options)}, least)
    if options:
        raise ArgumentError(f"to: options {sorted(options)} belong into the mapping's target objects")
    if not to:
        raise ArgumentError("to: the mapping is empty; give at least one site glob and its target")
    return Wish({glob: target_of(target) for glob, target in to.items()}, least)


def choose(plan: Plan, wish: Wish, sites: Selector | None, keep: Selector | None) -> Plan:
    """Give every site that is wanted its target."""
    _require_sites(plan, wish)
    wanted, kept = _selector(sites, plan, "sites"), _selector(keep, plan, "keep")
    for glob in wish.targets:
        if glob != "*":
            matching(glob, plan.sites, "to")

    def chosen(planned: PlannedSite) -> PlannedSite:
        target = next((t for glob, t in wish.targets.items() if fnmatchcase(planned.site.name, glob)), None)
        if target is None or planned.site.kind not in target.kinds:
            return planned
        if sites is not None and not wanted(planned.site):
            return planned.kept("not in sites")
        if keep is not None and kept(planned.site):
            return planned.kept("keep")
        return replace(planned, target=target)

    return replace(plan, wish=wish, sites=tuple(map(chosen, plan.sites)))


def _require_sites(plan: Plan, wish: Wish) -> None:
    reasons = "".join(f"\n  {r.name or '(root)'}: {r.reason}" for r in plan.refused)
    if not plan.sites:
        raise ConversionError(
            f"no attention, MLP or stem was recognized in {plan.donor.name}"
            + (f"; what came near:{reasons}" if reasons else "; is it a vision transformer?")
        )
    kinds = {kind for target in wish.targets.values() for kind in target.kinds}
    attention = any(isinstance(planned.site, AttentionSite) for planned in plan.sites)
    if not attention and not any(planned.site.kind in kinds for planned in plan.sites):
        raise ConversionError(
            f"no attention was found in {plan.donor.name}:{reasons or ' it has no softmax attention'}"
        )


def _selector(selector: Selector | None, plan: Plan, argument: str) -> Callable[[Site], bool]:
    if selector is None:
        return lambda site: False
    if selector == "auto":
        raise ArgumentError(f'{argument}: "auto" is for keep; name sites, e.g. sites=["blocks.0.*"]')
    if callable(selector):
        return selector
    globs = (
        [selector] if isinstance(selector, str) else list(selector) if isinstance(selector, Iterable) else [selector]
    )
    if not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(f"{argument}: expected a glob, several globs, or a function of a site, got {selector!r}")
    names = {id(p.site) for glob in globs for p in matching(glob, plan.sites, argument)}
    return lambda site: id(site) in names


def targeted(plan: Plan) -> list[int]:
    """The places of the sites that something is asked of."""
    return [place for place, each in enumerate(plan.sites) if each.target is not None]


def prove(
    plan: Plan, places: Sequence[int], progress: bool, settle: Settle = lambda planned, values: planned
) -> Plan:
    """Certify the sites at these ``places`` during one run of the captured graph; those that fail are refused, those
    that do not are settled.

    The model's outputs stay in the plan's values, and what is given to the first module of every kind that is changed.
    """
    sites = list(plan.sites)
    chosen = [sites[place].site for place in places]
    firsts = {(site.owner.kind, site.describe()): site.owner for site in reversed(chosen)}
    kept = {*plan.donor.output_nodes, *(node for owner in firsts.values() for node in nodes_of(owner.arguments))}
    with torch.no_grad(), tqdm(total=len(chosen), desc="certify", disable=not progress or None, leave=False) as bar:

        def certified(number: int, certificate: Certificate, values: Values) -> None:
            proved = replace(sites[places[number]], certificate=certificate)
            if certificate.passed:
                proved = settle(proved, values)
            else:
                proved = proved.refused(Refusal(f"{certificate}: its lifted form does not reproduce the model"))
            sites[places[number]] = proved
            bar.update()

        values = certify_running(chosen, plan.flow, kept, certified)
    return replace(plan, sites=tuple(sites), values=values)


class _Indices:
    """Counts the conversions that every target gave."""

    def __init__(self) -> None:
        self._given: Counter[int] = Counter()

    def classify(self, planned: PlannedSite, least: Exactness, flow: Dataflow) -> PlannedSite:
        """As ``classify``, of the next site of its target."""
        target = id(planned.target)
        classified = classify(replace(planned, index=self._given[target]), least, flow)
        self._given[target] += classified.converting
        return classified


def classify(planned: PlannedSite, least: Exactness, flow: Dataflow) -> PlannedSite:
    """Ask the target for the conversion of a site, at its index."""
    target, site = planned.target, planned.site
    assert target is not None
    try:
        conversion = target.convert(site, planned.index, flow.weights)
    except NothingToDo as reason:
        return replace(planned, why=str(reason))
    except Refusal as reason:
        return planned.refused(reason)
    if not isinstance(conversion, Conversion):
        raise ArgumentError(f"to: target {target} gave {conversion!r}; its convert has to return a Conversion")
    if conversion.exactness < least:
        return planned.kept(f"{conversion.exactness.name} is below fidelity={least.name.lower()!r}: {conversion.why}")
    _match(conversion, site)
    if least is Exactness.EXACT:
        for core in conversion.modules:
            hold_exact(core)
    return replace(planned, status="convert", conversion=conversion, keeps_prefix=conversion.keeps_function)


def fit(planned: PlannedSite, flow: Dataflow, values: Values) -> PlannedSite:
    """Let the target refit on the example input what only data tell."""
    assert planned.target is not None
    assert planned.conversion is not None
    conversion, site = planned.conversion, planned.site
    fitted = planned.target.fit(conversion, site, flow.weights, lambda node: value_of(node, flow, values))
    if fitted is conversion:
        return planned
    _match(fitted, site)
    return replace(planned, conversion=fitted)


def _match(conversion: Conversion, site: Site) -> None:
    """Give the new core the device and dtype of what the site computes."""
    value = (site.nodes.output.node if isinstance(site, AttentionSite) else site.result).meta["val"]
    for core in conversion.modules:
        core.to(device=value.device, dtype=value.dtype)
