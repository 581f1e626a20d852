"""Make a plan: capture, lift, choose, certify, classify, build, check, measure. The model is not changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..capture import (
    Capture,
    ModuleCall,
    NodeRef,
    capture,
    image_sides,
    one_sided_looks,
    other_looks,
    same_size_looks,
    training_look,
)
from ..capture.ambient import plain_modes
from ..certify import Certificate, certify_running, collect_values
from ..cores.exactness import hold_exact
from ..errors import UNFORESEEN, ArgumentError, ConversionError, NothingToDo, Refusal
from ..graph.dataflow import Dataflow
from ..graph.restating import restate
from ..graph.values import Values
from ..ir.contract import Conversion, Exactness, Target, exactness_of
from ..ir.sites import AttentionSite, Refused, Site
from ..lift.looks import Looks, Seen
from ..numerics.draws import Stream
from ..rewrite.check import misbehaviour, misbehaviour_in_model
from ..rewrite.owners import OwnerProgram, build_program
from ..rewrite.structure import structure_of
from ..rewrite.training import same_place, steps_of_training
from .measurement import measure, value_of
from .plan import Plan, matching
from .planned_site import PlannedSite
from .product_cost import count_products
from .registry import recognise_all, target_of

Selector = str | Iterable[str] | Callable[[Site], bool]
"""Sites by a glob of their names, by several, or by a predicate."""

To = str | Target | Mapping[str, str | Target]
"""A target by its name, a target object, or a mapping from globs of sites' names to either."""


def planned(
    model: nn.Module, example_inputs: Any | None, to: To, options: dict[str, Any], *, sites: Selector | None,
    keep: Selector | None, fidelity: str, max_rewrites: int | None, progress: bool,
) -> Plan:  # fmt: skip
    """Decide, certify and measure a conversion without changing the model; arguments and errors as for ``convert``."""
    least, targets = exactness_of(fidelity, "fidelity"), _targets(to, options)
    made, flow = lifted(model, example_inputs)
    _look_around(made)
    _choose(made, targets, sites, keep)
    chosen = [each for each in made.sites if each.target is not None]
    indices: Counter[int] = Counter()
    new_weights = Stream()

    def settle(planned: PlannedSite, values: Values) -> None:
        """While its values are there: they are memory that is not held for every site at once."""
        with new_weights.drawn_from():
            _classify(planned, least, flow, indices)
            if planned.status == "convert":
                _fit(planned, flow, values)
                measure(planned, flow, values)

    prove(made, chosen, flow, progress, settle)
    made.build()
    if max_rewrites is not None:
        made.limit(max_rewrites)
    _check_training(made)
    _check_behaviour(made, flow)
    count_products(made.converting)
    made.values = {node: made.values[node] for node in _references(made.capture.root.output)}  # the rest is memory
    return made


def decided(made: Plan, to: Any, fidelity: str, options: dict[str, Any]) -> Plan:
    """What ``plan`` would convert of what was lifted, where nothing is certified, rewritten or run.

    ``made`` is only read. Arguments and errors as for ``convert``.
    """
    least, targets = exactness_of(fidelity, "fidelity"), _targets(to, options)
    chosen = Plan(made.model, made.flow, [PlannedSite(planned.site) for planned in made.sites], made.refused)
    _choose(chosen, targets, None, None)
    indices: Counter[int] = Counter()
    with Stream().drawn_from():
        for planned in chosen.sites:
            if planned.target is not None:
                _classify(planned, least, made.flow, indices)
    return chosen


@plain_modes()
def lifted(model: nn.Module, example_inputs: Any | None) -> tuple[Plan, Dataflow]:
    """Everything recognised in ``model``, with nothing decided yet."""
    flow = Dataflow(capture(model, example_inputs))
    found = recognise_all(flow)
    sites = [PlannedSite(site) for site in _sites(found)]
    return Plan(model, flow, sites, [site for site in found if isinstance(site, Refused)]), flow


def _sites(found: list[Site | Refused]) -> list[Site]:
    return [site for site in found if not isinstance(site, Refused)]


def _look_around(made: Plan) -> None:
    """Look at the model at other sizes; its sites are then what all looks say of them."""

    def seen(look: Capture | None) -> Seen | None:
        if look is None:
            return None
        try:
            flow = Dataflow(look)
            return flow, _sites(recognise_all(flow))
        except UNFORESEEN:  # shapes alone were traced: on values, such as an index beyond a table, it does not run
            return None

    def all_seen(looks: list[Capture]) -> list[Seen]:
        return [found for look in looks if (found := seen(look)) is not None]

    made.looks = Looks(
        made.flow,
        [planned.site for planned in made.sites],
        all_seen(other_looks(made.capture)) if made.sites else [],
        lambda: all_seen(same_size_looks(made.capture)),
        lambda: all_seen(one_sided_looks(made.capture)),
    )
    if made.sites and not made.looks.others:
        _ = made.looks.other_batches  # wanted for every module then, and no values take memory yet
    for planned, site in zip(made.sites, made.looks.sites, strict=True):
        planned.site = site


def _targets(to: Any, options: dict[str, Any]) -> dict[str, Target]:
    """Targets by site glob; first match wins."""
    if not isinstance(to, Mapping):
        return {"*": target_of(to, options)}
    if options:
        raise ArgumentError(f"to: options {sorted(options)} belong into the mapping's target objects")
    if not to:
        raise ArgumentError("to: the mapping is empty; give at least one site glob and its target")
    return {glob: target_of(target) for glob, target in to.items()}


def _choose(made: Plan, targets: dict[str, Target], sites: Selector | None, keep: Selector | None) -> None:
    if not made.sites:
        reasons = "".join(f"\n  {r.name or '(root)'}: {r.reason}" for r in made.refused)
        raise ConversionError(
            f"no attention, MLP or stem was recognised in {type(made.model).__name__}"
            + (f"; what came near:{reasons}" if reasons else "; is it a vision transformer?")
        )
    if not any(isinstance(planned.site, AttentionSite) for planned in made.sites) and not _covers_kind(made, targets):
        reasons = (
            "".join(f"\n  {r.name or '(root)'}: {r.reason}" for r in made.refused) or " it has no softmax attention"
        )
        raise ConversionError(f"no attention was found in {type(made.model).__name__}:{reasons}")
    wanted, kept = _selector(sites, made, "sites"), _selector(keep, made, "keep")
    for glob in targets:
        if glob != "*":
            matching(glob, made.sites, "to")
    for planned in made.sites:
        target = next((t for glob, t in targets.items() if fnmatchcase(planned.site.name, glob)), None)
        if target is None or planned.site.kind not in target.kinds:
            continue
        if sites is not None and not wanted(planned.site):
            planned.keep("not in sites")
        elif keep is not None and kept(planned.site):
            planned.keep("keep")
        else:
            planned.target = target


def _covers_kind(made: Plan, targets: dict[str, Target]) -> bool:
    kinds = {kind for target in targets.values() for kind in target.kinds}
    return any(planned.site.kind in kinds for planned in made.sites)


def _selector(selector: Selector | None, made: Plan, argument: str) -> Callable[[Site], bool]:
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
    names = {id(p.site) for glob in globs for p in matching(glob, made.sites, argument)}
    return lambda site: id(site) in names


def prove(
    made: Plan,
    chosen: list[PlannedSite],
    flow: Dataflow,
    progress: bool,
    settle: Callable[[PlannedSite, Values], None] = lambda planned, values: None,
) -> None:
    """Certify the chosen sites during one run of the captured graph; sites that fail are refused, those that do not are
    settled on the values that they were certified on.

    The model's outputs stay in ``made.values``, and what is given to the first module of every kind that is changed.
    """
    firsts = {(type(each.site.owner.module), each.site.describe()): each.site.owner for each in reversed(chosen)}
    kept = {node for owner in firsts.values() for node in _arguments(owner)} | _references(made.capture.root.output)
    with torch.no_grad(), tqdm(total=len(chosen), desc="certify", disable=not progress or None, leave=False) as bar:

        def certified(place: int, certificate: Certificate, values: Values) -> None:
            planned = chosen[place]
            planned.certificate = certificate
            if certificate.passed:
                settle(planned, values)
            else:
                planned.refuse(Refusal(f"{certificate}: its lifted form does not reproduce the model"))
            bar.update()

        made.values = certify_running([planned.site for planned in chosen], flow, kept, certified)


def _classify(planned: PlannedSite, least: Exactness, flow: Dataflow, indices: Counter[int]) -> None:
    """Ask the target for the conversion of a site; ``indices`` counts those that it gave, by its identity."""
    assert planned.target is not None
    try:
        conversion = planned.target.convert(planned.site, indices[id(planned.target)], flow.weights)
    except NothingToDo as reason:
        planned.why = str(reason)
        return
    except Refusal as reason:
        planned.refuse(reason)
        return
    if not isinstance(conversion, Conversion):
        raise ArgumentError(f"to: target {planned.target} gave {conversion!r}; its convert has to return a Conversion")
    if conversion.exactness < least:
        planned.keep(f"{conversion.exactness.name} is below fidelity={least.name.lower()!r}: {conversion.why}")
        return
    _match(conversion, planned.site)
    if least is Exactness.EXACT:
        for core in conversion.modules:
            hold_exact(core)
    planned.status, planned.conversion = "convert", conversion
    indices[id(planned.target)] += 1


def _fit(planned: PlannedSite, flow: Dataflow, values: Values) -> None:
    """Let the target refit on the example input what only data tell."""
    assert planned.target is not None
    assert planned.conversion is not None
    conversion, site = planned.conversion, planned.site
    fitted = planned.target.fit(conversion, site, flow.weights, lambda node: value_of(node, flow, values))
    if fitted is not conversion:
        _match(fitted, site)
        planned.conversion = fitted


def _match(conversion: Conversion, site: Site) -> None:
    """Give the new core the device and dtype of what the site computes."""
    value = (site.nodes.output.node if isinstance(site, AttentionSite) else site.result).meta["val"]
    for core in conversion.modules:
        core.to(device=value.device, dtype=value.dtype)


def _check_training(made: Plan) -> None:
    """Refuse what is another function in training mode, or is given what is no map there: at the captured size, and at
    another, where a branch of training may come to another end."""
    reasons: dict[int, str] = {}
    looks = [] if made.looks is None else made.looks.others[:1]
    for look in (made.capture, *(each.flow.capture for each in looks)) if made.programs else ():
        training = training_look(look)
        if training is not None:
            restate(training)
        for owner in made.programs:
            call = owner.call if look is made.capture else same_place(owner.call, made.capture, look)
            if call is not None and not (look is not made.capture and owner.fixed_to):  # elsewhere that one raises
                reason = steps_of_training(owner, call, look, training)
                reasons |= {id(site): reason for site in owner.sites if reason}
    for planned in made.converting:
        if id(planned.site) in reasons:
            planned.refuse(Refusal(reasons[id(planned.site)]))
    if reasons:
        made.build()


def _check_behaviour(made: Plan, flow: Dataflow) -> None:
    """Run one rewritten module of every structure beside its donor; an inexact one with cores that change nothing.
    Those that do not run alone, such as a block whose parent tells it the sides of its map, run inside the model."""
    planned = {id(p.site): p for p in made.converting}
    sides = image_sides(made.capture)
    if made.looks is not None and sides is not None:
        made.looks.size.note(sides)  # modules run alone, as on the captured image
    structures = {owner.path: structure_of(owner) for owner in made.programs}
    firsts = {structures[owner.path]: owner for owner in reversed(made.programs)}
    unseen = {node for owner in firsts.values() for node in _arguments(owner.call)} - made.values.keys()
    if unseen:  # of modules around those that were certified
        made.values |= collect_values(flow, unseen)
    inputs = {node: made.capture.tensors[node] for node in made.capture.inputs}
    given = (made.capture.root, made.values | inputs, flow.constants, made.capture.batch)
    verdicts: dict[Hashable, str | None] = {}
    unrun: list[tuple[OwnerProgram, OwnerProgram]] = []
    for owner in made.programs:
        structure, owned = structures[owner.path], [planned[id(site)] for site in owner.sites]
        kept = all(p.conversion and p.conversion.keeps_function for p in owned)
        twin: OwnerProgram | None = None
        if structure not in verdicts or verdicts[structure] is None:
            twin = owner if kept else _with_own_function(owner, made)
        if structure not in verdicts:
            verdicts[structure], keeps = misbehaviour(twin, *given) if twin else ("", [])
            alike = [path for path, other in structures.items() if keeps and other == structure]
            made.keeps |= dict.fromkeys(alike, keeps)
        if verdicts[structure] is None and twin is not None:
            unrun.append((owner, twin))
        for each in owned if verdicts[structure] else ():
            each.refuse(Refusal(str(verdicts[structure])))
    reason = ""
    if unrun:
        twins = [twin for _, twin in unrun]
        reason = misbehaviour_in_model(twins, made.model, made.capture.example, made.capture.batch)
    for owner, _ in unrun if reason else ():
        for site in owner.sites:
            planned[id(site)].refuse(Refusal(f"rewritten, the model differs from the original ({reason})"))
    if made.looks is not None:
        made.looks.size.forget()
    if reason or any(verdicts.values()):
        made.build()


def _with_own_function(owner: OwnerProgram, made: Plan) -> OwnerProgram | None:
    """The same module rewritten at the same sites, with cores that keep its function."""
    exact = target_of("identity")
    try:
        conversions = {id(site): exact.convert(site, 0, made.flow.weights) for site in owner.sites}
    except NothingToDo:
        return None
    assert made.looks is not None
    return build_program(owner.call, owner.sites, made.looks, lambda site: conversions[id(site)])[0]


def _arguments(call: ModuleCall) -> set[Node]:
    return _references(call.arguments)


def _references(tree: Any) -> set[Node]:
    return {leaf.node for leaf in tree_leaves(tree) if isinstance(leaf, NodeRef) and leaf.node is not None}
