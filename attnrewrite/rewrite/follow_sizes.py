"""Make an outlined graph follow the sizes of its inputs, as far as several looks at the model show how it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..capture import CapturedGraph, ModuleCall, image_sides
from ..capture.sizes import Decision
from ..errors import UNFORESEEN, Refusal, unforeseen
from ..ir.image_map import ImageSize, laws_of
from ..lift.looks import Look, Looks
from .image_sides import ImageSide, SameImage
from .outline import Outlined
from .restated_sizes import restate
from .same_graph import difference
from .size_course import CHECK, Course
from .size_forms import Vector
from .terms_by_look import same_way

Key = tuple[tuple[str, int, int], int]
"""Of a decision: its place in the code, and how often the module had come to it before."""


def follow_sizes(outlined: Outlined, looks: Looks, again: Callable[[Look], Outlined]) -> Outlined:
    """Restate the numbers of ``outlined`` and guard its course.

    Args:
        again: outlines the same module with the same sites on a look; ``LookupError``, ``Refusal`` or what is
            unforeseen where that cannot be.

    Returns:
        The graph that follows sizes, ``outlined`` itself or made anew. ``tied`` says why it holds for the captured
        sizes only, if it does: on other images it then stops.
    """
    tied: list[str] = list(outlined.tied)
    live = {child.path for child in outlined.live}
    own = _decisions(outlined.capture, outlined.call, live)
    agreeing, strangers = _compared(outlined, looks.others, again)
    tied += _unguarded(outlined, agreeing, strangers, looks)
    if not tied and not any(_is_of_other_size(twin, outlined) for twin in agreeing):
        tied.append("no other size was seen to take the same course")
    # decided by sizes, perhaps for each side by itself, or made of them unseen: alike on few looks by accident
    unseen = _loses([outlined, *agreeing])
    if not tied and (unseen or len(_courses(own, agreeing, live)) > 1):
        more, others = _compared(outlined, looks.further, again)
        agreeing += more
        tied += _unguarded(outlined, agreeing, [*strangers, *(others if unseen else [])], looks)
    if not tied:
        tied += _restate(outlined, own, agreeing, looks)
        if not tied:
            outlined.fixed = _fixed(outlined, agreeing)
            return outlined
        outlined = again(looks.itself)  # the other was restated in part
    batches, strangers = _compared(outlined, looks.other_batches, again)
    guarded = not _unguarded(outlined, batches or agreeing, strangers, looks)
    free = batches or ([again(look) for look, _ in strangers] if guarded and agreeing else [])
    unexplained = _restate(outlined, own, batches or agreeing, looks)
    tied += unexplained
    # what is not explained may come from the batch, and what is another graph at another one
    outlined.fixed = _fixed(outlined, free if guarded and not unexplained else [])
    outlined.tied = list(dict.fromkeys(tied))
    _hold_to_image(outlined, looks.size)
    return outlined


Stranger = tuple[Look, str]
"""A look at which the module is another graph, and the reason."""


def _compared(
    outlined: Outlined, looks: list[Look], again: Callable[[Look], Outlined]
) -> tuple[list[Outlined], list[Stranger]]:
    """What agrees with the graph on other looks, and the looks at which it is another, or none."""
    agreeing, strangers = [], []
    for look in looks:
        try:
            twin = again(look)
            reason = difference(outlined, twin)
        except (Refusal, LookupError) as cause:
            reason = str(cause)
        except UNFORESEEN as cause:
            reason = unforeseen(cause)
        if reason:
            strangers.append((look, reason))
        else:
            agreeing.append(twin)
    return agreeing, strangers


def _unguarded(outlined: Outlined, agreeing: list[Outlined], strangers: list[Stranger], looks: Looks) -> list[str]:
    """The reasons of the ``strangers`` that no decision tells from every way on which the graph was seen: a guard on
    these ways would let them pass."""
    live = {child.path for child in outlined.live}
    ways = [_decisions(each.capture, each.call, live) for each in (outlined, *agreeing)]
    return [
        reason
        for look, reason in strangers
        if not all(_decides_otherwise(way, outlined.call, live, look, looks) for way in ways)
    ]


def _restate(outlined: Outlined, own: dict[Key, Decision], agreeing: list[Outlined], looks: Looks) -> list[str]:
    """Restate what moves between a graph and those of other looks that agree with it; what could not be."""
    courses = _courses(own, agreeing, {child.path for child in outlined.live})
    reader = _ImageReader(outlined, agreeing, looks.size)
    leaving = _contiguous_outside(outlined, agreeing)
    unexplained = restate(outlined, agreeing, courses, reader.side)
    for user, value in leaving:
        with outlined.graph.inserting_before(user):
            user.replace_input_with(value, outlined.graph.call_function(torch.ops.aten.contiguous.default, (value,)))
    return unexplained


def _contiguous_outside(outlined: Outlined, others: list[Outlined]) -> list[tuple[fx.Node, fx.Node]]:
    """Users outside of the module's own code and values that they are given contiguous on every look: they may view
    them. Copies that a trace shows on one look and not on another are not part of what was outlined."""
    children = {child.path.removeprefix(f"{outlined.call.path}.") for child in outlined.live}
    graphs = [outlined.graph.nodes, *(each.graph.nodes for each in others)]
    twins = {node: same for node, *same in zip(*graphs, strict=True)}

    def contiguous(node: fx.Node) -> bool:
        values = [each.meta.get("val") for each in (node, *twins[node])]
        return all(isinstance(value, Tensor) and value.is_contiguous() for value in values)

    return [
        (user, value)
        for user in outlined.graph.nodes
        if user.op == "output" or (user.op == "call_module" and user.target in children)
        for value in user.all_input_nodes
        if value.op == "call_function" and contiguous(value)
    ]


def _fixed(outlined: Outlined, free: list[Outlined]) -> dict[fx.Node, Any]:
    """What the graph is given and what has to stay as it was: numbers, and of tensors the extents that did not move
    between ``free`` looks (None for those that did)."""
    fixed: dict[fx.Node, Any] = {}
    for leaf, *others in zip(outlined.leaves, *(each.leaves for each in free), strict=True):
        value, number = leaf.meta.get("val"), leaf.meta.get("value")
        if isinstance(value, Tensor):
            shapes = [value.shape, *(other.meta["val"].shape for other in others)]
            fixed[leaf] = tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
        elif all(other.meta.get("value") == number for other in others):
            fixed[leaf] = number
    return fixed


def _loses(looks: list[Outlined]) -> bool:
    """Whether the module's own code made plain numbers of any that move with the size, or is given such."""
    lost = [
        [number for position, number in each.capture.sizes.lost if each.owns_decision(position)]
        + [leaf.meta.get("value") for leaf, term in zip(each.leaves, each.call.sizes, strict=True) if term is None]
        for each in looks
    ]
    return any(each != lost[0] for each in lost)


def _is_of_other_size(twin: Outlined, outlined: Outlined) -> bool:
    """Whether a look differs in more than the batch, as far as the image, or else the module's arguments, show it."""
    sides = [image_sides(each.capture) for each in (outlined, twin)]
    if sides[0] != sides[1]:
        return True
    values = ((one.meta.get("val"), two.meta.get("val")) for one, two in zip(outlined.leaves, twin.leaves, strict=True))
    return any(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] != b.shape[1:] for a, b in values)


def _decisions(capture: CapturedGraph, call: ModuleCall, live: set[str]) -> dict[Key, Decision]:
    """What the module's own code, and that of children dissolved into it, decided by sizes."""
    found: dict[Key, Decision] = {}
    counted: Counter[tuple[str, int, int]] = Counter()
    for decision in capture.sizes.decisions:
        step = decision.call
        while step is not None and step is not call and step.path not in live:
            step = step.parent
        if step is call:
            found[decision.place, counted[decision.place]] = decision
            counted[decision.place] += 1
    return found


def _decides_otherwise(own: dict[Key, Decision], call: ModuleCall, live: set[str], look: Look, looks: Looks) -> bool:
    """Whether a decision tells this look from the first, so that a guard on it stops what takes the look's course."""
    try:
        theirs = _decisions(look.flow.capture, look.call(call, looks.first), live)
    except LookupError:
        return False
    return any(key in theirs and theirs[key].outcome != decision.outcome for key, decision in own.items())


def _courses(own: dict[Key, Decision], agreeing: list[Outlined], live: set[str]) -> list[Course]:
    """The ways through its decisions on which the module was seen to be what was outlined, the captured one first."""
    ways = [list(way.items()) for way in (own, *(_decisions(twin.capture, twin.call, live) for twin in agreeing))]
    courses: dict[tuple[tuple[Key, bool], ...], Course] = {}
    for way in ways:
        course: Course = []
        for place, (key, decision) in enumerate(way):
            # what a decision is about may depend on those before it, as the side that `min` gave
            everywhere = tuple(dict(other)[key].operands if key in dict(other) else None for other in ways)
            alike = tuple(_operands(other, way[:place], key) for other in ways)
            course.append((decision, everywhere if same_way(everywhere) else alike))
        courses.setdefault(_outcomes(way), course)
    return list(courses.values())


def _outcomes(way: list[tuple[Key, Decision]]) -> tuple[tuple[Key, bool], ...]:
    return tuple((key, decision.outcome) for key, decision in way)


def _operands(way: list[tuple[Key, Decision]], before: list[tuple[Key, Decision]], key: Key) -> Any:
    """Of the decision ``key``, on a way that comes to it as another did, by the decisions ``before``; else None."""
    place = len(before)
    if _outcomes(way[:place]) != _outcomes(before) or place >= len(way) or way[place][0] != key:
        return None
    return way[place][1].operands


class _ImageReader:
    """Gives the graph numbers that follow the image where nothing that the module is given does."""

    def __init__(self, outlined: Outlined, agreeing: list[Outlined], size: ImageSize) -> None:
        self.outlined, self.size = outlined, size
        sides = [image_sides(each.capture) for each in (outlined, *agreeing)]
        self.images = [each for each in sides if each is not None]

    def side(self, vector: Vector) -> fx.Node | None:
        """A graph value for a number that was ``vector[look]``, if it is a side of some map of the image."""
        if len(self.images) != len(vector):
            return None
        for axis in (0, 1):
            pairs = [(image[axis], int(number)) for image, number in zip(self.images, vector, strict=True)]
            laws = laws_of(pairs)
            if laws:
                module = ImageSide(self.size, axis, laws)
                return self.outlined.graph.call_module(self.outlined.add_module("image_side", module))
        return None


def _hold_to_image(outlined: Outlined, size: ImageSize) -> None:
    sides = image_sides(outlined.capture)
    if sides is None:
        return
    start = next(node for node in outlined.graph.nodes if node.op != "placeholder")
    with outlined.graph.inserting_before(start):
        check = outlined.graph.call_module(outlined.add_module("same_image", SameImage(size, sides)))
        check.meta[CHECK] = True
