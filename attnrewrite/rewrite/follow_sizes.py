"""Make an outlined graph follow the sizes of its inputs, as far as several looks at the model show how it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ..capture import Capture, ModuleCall, image_sides
from ..capture.sizes import Decision
from ..errors import UNFORESEEN, unforeseen
from ..image_map import ImageSize, laws_of
from ..lift.looks import Look, Looks
from .image_sides import ImageSide, SameImage
from .outline import NotOutlinable, Outlined
from .sizes import CHECK, Vector, difference, restate

Key = tuple[tuple[str, int, int], int]
"""Of a decision: its place in the code, and how often the module had come to it before."""


def follow_sizes(outlined: Outlined, looks: Looks, again: Callable[[Look], Outlined]) -> list[str]:
    """Restate the numbers of ``outlined``, in place, and guard its course.

    Args:
        again: outlines the same module with the same sites on another look; ``LookupError``, ``NotOutlinable`` or what
            is unforeseen where that cannot be.

    Returns:
        Why the graph holds for the captured sizes only, if it does: on other images it then stops.
    """
    agreeing: list[Outlined] = []
    tied: list[str] = list(outlined.tied)
    live = {child.path for child in outlined.live}
    own = _decisions(outlined.capture, outlined.call, live)
    for look in looks.others:
        twin, reason = _again(outlined, look, again)
        if twin is not None:
            agreeing.append(twin)
        elif not _decides_otherwise(own, outlined.call, live, look, looks):
            tied.append(reason)
    if not tied and not any(_is_of_other_size(twin, outlined) for twin in agreeing):
        tied.append("no other size was seen to take the same course")
    batches = []
    if tied and looks.other_batch is not None:
        twin, _ = _again(outlined, looks.other_batch, again)
        batches = [] if twin is None else [twin]
    guards = _guards(own, [*agreeing, *batches], live)
    reader = _ImageReader(outlined, [*agreeing, *batches], looks.size)
    tied += restate(outlined, [*agreeing, *batches], guards, reader.side)
    outlined.fixed = _fixed(outlined, batches if tied else agreeing)
    if tied:
        _hold_to_image(outlined, looks.size)
    return tied


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


def _again(outlined: Outlined, look: Look, again: Callable[[Look], Outlined]) -> tuple[Outlined | None, str]:
    """The same graph on another look, or the reason why it is not the same."""
    try:
        twin = again(look)
    except (NotOutlinable, LookupError) as cause:
        return None, str(cause)
    except UNFORESEEN as cause:
        return None, unforeseen(cause)
    reason = difference(outlined, twin)
    return (None, reason) if reason else (twin, "")


def _is_of_other_size(twin: Outlined, outlined: Outlined) -> bool:
    """Whether a look differs in more than the batch, as far as the image, or else the module's arguments, show it."""
    sides = [image_sides(each.capture) for each in (outlined, twin)]
    if sides[0] != sides[1]:
        return True
    values = ((one.meta.get("val"), two.meta.get("val")) for one, two in zip(outlined.leaves, twin.leaves, strict=True))
    return any(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] != b.shape[1:] for a, b in values)


def _decisions(capture: Capture, call: ModuleCall, live: set[str]) -> dict[Key, Decision]:
    """What the module's own code, and that of children dissolved into it, decided by sizes."""
    children = [child for child in call.walk() if child is not call and child.path in live]
    found: dict[Key, Decision] = {}
    counted: Counter[tuple[str, int, int]] = Counter()
    for decision in capture.sizes.decisions:
        inside = call.encloses(decision.position) or decision.position == call.exit == call.enter
        if not inside or any(child.encloses(decision.position) for child in children):
            continue
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


def _guards(
    own: dict[Key, Decision], agreeing: list[Outlined], live: set[str]
) -> list[tuple[Decision, list[tuple[Any, ...]]]]:
    """Decisions that the course may hang on, with their operands on the agreeing looks: those that one of these does
    not come to, or takes otherwise, have no part in what was outlined."""
    found = []
    others = [_decisions(twin.capture, twin.call, live) for twin in agreeing]
    for key, decision in own.items():
        theirs = [each[key] for each in others if key in each]
        if len(theirs) == len(others) and all(each.outcome == decision.outcome for each in theirs):
            found.append((decision, [each.operands for each in theirs]))
    return found


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
