"""Checks of a plan: what would be another function once it is rewritten is refused. Each gives the plan without it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from torch.fx import Node

from ..capture import image_sides, training_look
from ..certify import collect_values
from ..errors import NothingToDo, Refusal
from ..graph.restating import restate
from ..rewrite.check import misbehavior, misbehavior_in_model
from ..rewrite.owners import OwnerProgram, build_program
from ..rewrite.structure import structure_of
from ..rewrite.training import same_place, steps_of_training
from .donor import nodes_of
from .plan import Plan
from .registry import target_of


def check_training(plan: Plan) -> Plan:
    """Refuse what is another function in training mode, or is given what is no map there: at the captured size, and at
    another, where a branch of training may come to another end."""
    reasons: dict[int, str] = {}
    looks = [each.flow.capture for each in plan.looks.others[:1]]
    for look in (plan.capture, *looks) if plan.programs else ():
        training = training_look(plan.capture, look)
        if training is not None:
            restate(training)
        for owner in plan.programs:
            call = owner.call if look is plan.capture else same_place(owner.call, plan.capture, look)
            if call is not None and not (look is not plan.capture and owner.fixed_to):  # elsewhere that one raises
                reason = steps_of_training(owner, call, look, training)
                reasons |= {id(site): reason for site in owner.sites if reason}
    return _without(plan, reasons)


def check_behavior(plan: Plan) -> Plan:
    """Run one rewritten module of every structure beside its donor; an inexact one with cores that change nothing.
    Those that do not run alone, such as a block whose parent tells it the sides of its map, run inside the model."""
    sides = image_sides(plan.capture)
    if sides is not None:
        plan.looks.size.note(sides)  # modules run alone, as on the captured image
    alone = _run_alone(plan)
    reasons = dict(alone.reasons)
    if alone.unrun:
        twins = [twin for _, twin in alone.unrun]
        reason = misbehavior_in_model(twins, plan.model, plan.capture.example, plan.capture.batch)
        told = f"rewritten, the model differs from the original ({reason})"
        reasons |= {id(site): told for owner, _ in alone.unrun if reason for site in owner.sites}
    plan.looks.size.forget()
    return _without(replace(plan, keeps=alone.keeps), reasons)


@dataclass
class _Alone:
    """What was seen of modules that ran alone: why sites are refused, by ``id``; those that did not run, with what
    stands for them; and by path the attributes in which a module keeps what it computed."""

    reasons: dict[int, str] = field(default_factory=dict)
    unrun: list[tuple[OwnerProgram, OwnerProgram]] = field(default_factory=list)
    keeps: dict[str, list[str]] = field(default_factory=dict)


def _run_alone(plan: Plan) -> _Alone:
    """Run the first module of every structure; what is seen of it holds for the others."""
    planned = {id(p.site): p for p in plan.converting}
    structures = {owner.path: structure_of(owner) for owner in plan.programs}
    values = plan.values | _missing(plan, {structures[owner.path]: owner for owner in reversed(plan.programs)})
    inputs = {node: plan.capture.tensors[node] for node in plan.capture.inputs}
    given = (plan.model, plan.capture.root, values | inputs, plan.flow.constants, plan.capture.batch)
    verdicts: dict[Hashable, str | None] = {}
    seen = _Alone()
    for owner in plan.programs:
        structure = structures[owner.path]
        kept = all((conversion := planned[id(site)].conversion) and conversion.keeps_function for site in owner.sites)
        twin: OwnerProgram | None = None
        if structure not in verdicts or verdicts[structure] is None:
            twin = owner if kept else _with_own_function(owner, plan)
        if structure not in verdicts:
            verdicts[structure], keeps = misbehavior(twin, *given) if twin else ("", [])
            alike = [path for path, other in structures.items() if keeps and other == structure]
            seen.keeps |= dict.fromkeys(alike, keeps)
        verdict = verdicts[structure]
        if verdict is None and twin is not None:
            seen.unrun.append((owner, twin))
        seen.reasons |= {id(site): verdict for site in owner.sites if verdict}
    return seen


def _missing(plan: Plan, firsts: Mapping[Hashable, OwnerProgram]) -> dict[Node, object]:
    """What modules around those that were certified are given."""
    unseen = {node for owner in firsts.values() for node in nodes_of(owner.call.arguments)} - plan.values.keys()
    return collect_values(plan.flow, unseen) if unseen else {}


def _with_own_function(owner: OwnerProgram, plan: Plan) -> OwnerProgram | None:
    """The same module rewritten at the same sites, with cores that keep its function."""
    exact = target_of("identity")
    try:
        conversions = {id(site): exact.convert(site, 0, plan.flow.weights) for site in owner.sites}
    except NothingToDo:
        return None
    return build_program(plan.capture, owner.call, owner.sites, plan.looks, lambda site: conversions[id(site)])[0]


def _without(plan: Plan, reasons: Mapping[int, str]) -> Plan:
    """The plan with the sites that have a reason, by ``id``, refused."""
    if not reasons:
        return plan
    sites = tuple(
        each.refused(Refusal(reasons[id(each.site)])) if each.converting and id(each.site) in reasons else each
        for each in plan.sites
    )
    return replace(plan, sites=sites).build()
