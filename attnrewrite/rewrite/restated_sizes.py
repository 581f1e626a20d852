"""Numbers of an outlined graph that move with the sizes of its inputs, restated as expressions of them.

The same graph was outlined from several looks at the model. A number that all looks have in common is a constant; one
that moves is matched, as the vector of what it was on every look, with the extents of the graph's own values, with what
the model itself computed from sizes, and with a few simple forms of both. What is not explained that way ties the graph
to the sizes at which it was captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from ..capture.size_terms import Arithmetic, Side, Term
from ..capture.sizes import Decision
from .outline import Outlined
from .same_graph import is_number, leaves_of, name_of
from .size_course import CHECK, Course, expect_course, expect_met, meets
from .size_forms import Emit, Vector, product_form, real_form, whole_form
from .terms_by_look import agree, first_known, kind_of, operands_of, told_apart, value_of, way_of

_TELLING = 16
"""A number of unknown origin is small if it is never this large."""


def restate(
    first: Outlined,
    others: list[Outlined],
    courses: list[Course],
    from_image: Callable[[Vector], Any],
) -> list[str]:
    """Restate, in place, what moves between ``first`` and the ``others``, all the same but for numbers.

    Args:
        courses: ways through the comparisons of sizes on which the graph was seen to be the same, the first its own. On
            any other it stops.
        from_image: a graph value for a number that follows the image, or None.

    Returns:
        The names of what could not be explained.
    """
    return _Restating(first, others, from_image).run(courses)


class _Restating:
    def __init__(self, first: Outlined, others: list[Outlined], from_image: Callable[[Vector], Any]) -> None:
        self.graph, self.from_image = first.graph, from_image
        self.outlined = [first, *others]
        self.nodes = list(first.graph.nodes)
        self.twins = {n: list(t) for n, *t in zip(self.nodes, *(o.graph.nodes for o in others), strict=True)}
        self.place = [dict(zip(each.graph.nodes, self.nodes, strict=True)) for each in self.outlined]
        self.known: dict[Vector, Emit] = {}
        self.measured: set[Vector] = set()
        self.written: dict[tuple[Any, ...], Node] = {}
        self.awaited = {node for node in self.nodes if node.op != "placeholder"}
        self.extents: dict[Node, tuple[list[Vector], list[Emit]]] = {}
        self.donors: dict[Vector, list[tuple[Term, ...]]] = {}
        own = list(self._own_terms(first, others))
        steps = {operand for terms in own if isinstance(terms[0], Arithmetic) for operand in terms[0].operands}
        for terms in sorted(own, key=lambda terms: terms[0] in steps):  # what nothing more was computed of comes first
            self.donors.setdefault(self._vector(terms), []).append(terms)
        self.steps: list[list[tuple[Any, bool] | None]] = []
        self.tied: list[str] = []

    def run(self, courses: list[Course]) -> list[str]:
        for node in self.nodes:
            if node.op == "placeholder":
                self._know(node)
        self.steps = [[] for _ in courses]
        guarded = False
        for node in self.nodes:
            if node.op == "placeholder":
                continue
            guarded = guarded or self._guard(courses, node)
            self._restate(node)
            self.awaited.discard(node)
            if node.op != "output":
                self._know(node)
                self._hold(node)
        if not guarded:
            self.tied += [str(decision) for decision, _ in courses[0]]
        return self.tied

    def _know(self, node: Node) -> None:
        """Its extents can be asked for from now on; a number that the module is given can be used."""
        number = node.meta.get("value")
        if is_number(number):
            vector = (number, *(twin.meta.get("value", math.nan) for twin in self.twins[node]))
            self._measured(vector, lambda: node)
        values = [each.meta.get("val") for each in (node, *self.twins[node])]
        shapes = [value.shape for value in values if isinstance(value, Tensor)]
        if len(shapes) < len(values) or len({len(shape) for shape in shapes}) != 1:
            return
        extents = list(zip(*shapes, strict=True))
        emits = [_once(partial(self.graph.call_method, "size", (node, axis))) for axis in range(len(extents))]
        self.extents[node] = extents, emits
        for vector, emit in zip(extents, emits, strict=True):
            self._measured(vector, emit)

    def _hold(self, node: Node) -> None:
        """Put a check there if extents that move met on every look: the model may have asked for them, and what it made
        of them stands as it was where that left no term (``math.isqrt`` takes an integer for what it is)."""
        shapes = [self.extents[used][0] for used in (node, *node.all_input_nodes) if used in self.extents]
        if node in self.extents and meets(*shapes):
            met = tuple(vector[0] if len(set(vector)) == 1 else None for vector in shapes[0])
            with self.graph.inserting_before(node.next):
                self.graph.call_function(expect_met, (node, met, name_of(node))).meta[CHECK] = True

    def _measured(self, vector: Vector, emit: Emit) -> None:
        """An extent, or a number that the module is given."""
        self._learn(vector, emit)
        self.measured.add(vector)

    def _learn(self, vector: Vector, emit: Emit) -> None:
        if len(set(vector)) > 1:
            self.known.setdefault(vector, _once(emit))

    def _restate(self, node: Node) -> None:
        vectors = list(zip(*(leaves_of(each) for each in (node, *self.twins[node])), strict=True))
        terms = self._given_terms(node)
        moves = [own is not None and own != () and None not in own and self._moves(own) for own in terms]
        moving = [
            is_number(vector[0]) and (len(set(vector)) > 1 or computed)
            for vector, computed in zip(vectors, moves, strict=True)
        ]
        if not any(moving):
            return
        with self.graph.inserting_before(node):
            found = [
                vector[0] if not moves else self._untracked(vector) if own is None else self._expression(vector, own)
                for vector, own, moves in zip(vectors, terms, moving, strict=True)
            ]
        if any(value is None and moves for value, moves in zip(found, moving, strict=True)):
            self.tied.append(name_of(node))
            return
        changes = iter(found)
        node.args = fx.node.map_aggregate(node.args, lambda leaf: next(changes))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda leaf: next(changes))

    def _given_terms(self, node: Node) -> list[tuple[Term | None, ...] | None]:
        """For every leaf of its arguments what the model's own code put there, look by look: a term if that came from
        sizes. None where it put a plain number, or it is not known; an empty tuple where it is one of several terms of
        one value, or the operator's own."""
        counts = len(list(leaves_of(node)))
        looks = []
        for each, outlined in zip((node, *self.twins[node]), self.outlined, strict=True):
            captured = outlined.restated.get(each)
            if captured is None:  # a step of our own
                return [()] * counts
            position = outlined.capture.position.get(captured)
            given = None if position is None else outlined.capture.sizes.given_at(position)
            if given is None:
                return [None] * counts
            leaves = list(leaves_of(each))
            terms = iter(given.terms_of([leaf for leaf in leaves if is_number(leaf)]))
            looks.append([next(terms) if is_number(leaf) else {None} for leaf in leaves])
        return [told_apart(candidates) for candidates in zip(*looks, strict=True)]

    def _guard(self, courses: list[Course], before: Node) -> bool:
        """Put a check there of as much of the course as the graph can tell by now; whether that is all. Other ways
        count as far as it can tell them, and in the end those that it can tell whole."""
        own = self.steps[0]
        told = len(own)
        with self.graph.inserting_before(before):
            for course, steps in zip(courses, self.steps, strict=True):
                self._tell(course, steps)
            whole = len(own) == len(courses[0])
            if not whole and len(own) == told:
                return False
            ways = [
                [step for step in steps if step is not None]
                for course, steps in zip(courses, self.steps, strict=True)
                if not whole or len(steps) == len(course)
            ]
            if all(ways):  # else one way hangs on no size that moves
                decisions = dict.fromkeys(str(decision) for decision, _ in courses[0][: len(own)])
                check = (ways, ", ".join(decisions))
                self.graph.call_function(expect_course, check).meta[CHECK] = True
        return whole

    def _tell(self, course: Course, steps: list[tuple[Any, bool] | None]) -> None:
        """Add to ``steps`` the ``(holds, outcome)`` of further decisions of a course, ``holds`` as a graph value, up to
        the first that the graph cannot tell yet; None for those that hang on no size that moves."""
        for decision, looks in course[len(steps) :]:
            operands = self._operands(decision, looks)
            if None in operands:
                return
            moves = any(isinstance(operand, Node) for operand in operands)
            holds = self.graph.call_function(decision.function, tuple(operands)) if moves else None
            steps.append((holds, decision.outcome) if moves else None)

    def _operands(self, decision: Decision, looks: tuple[tuple[Any, ...] | None, ...]) -> list[Any]:
        found = []
        for place in range(len(decision.operands)):
            terms = tuple(None if each is None else each[place] for each in looks)
            found.append(self._emitted(terms) if self._moves(terms) else first_known(self._vector(terms)))
        return found

    def _untracked(self, vector: Vector) -> Any:
        """A graph value for a number whose origin was lost, as by ``int``: small ones are equal to much by accident."""
        telling = max(vector) >= _TELLING and len(set(vector)) == len(vector)
        if telling or any(isinstance(value, float) for value in vector):
            return self._expression(vector)
        return self.known[vector]() if vector in self.measured else None

    def _expression(self, vector: Vector, given: tuple[Term | None, ...] = ()) -> Any:
        """A graph value that is ``vector[look]`` on every look, or None; as the model itself computes it if that is
        ``given``."""
        if None in given:  # a number of its own on some looks: the larger or smaller one
            return self._extreme(vector, given)
        if given and self._vector(given) == vector:
            emitted = self._emitted(given)
            if emitted is not None:
                return emitted
            if len(set(map(way_of, given))) > 1:  # what explains a few looks is no explanation of several ways
                return None
        if len(set(vector)) == 1:  # it comes from sizes that move: that it did not move proves nothing
            return None
        if vector in self.known:
            return self.known[vector]()
        for terms in self.donors.get(vector, []):
            emitted = self._emitted(terms)
            if emitted is not None:
                return emitted
        formed = self._simple_form(vector)
        if formed is not None:
            self.known.setdefault(vector, lambda: formed)
        return formed

    def _simple_form(self, vector: Vector) -> Any:
        if any(isinstance(value, float) for value in vector):
            return real_form(self.graph, [*self.known.items(), *self._whole_donors()], vector)
        batches = tuple(each.capture.batch for each in self.outlined)
        # few samples make small numbers, of which much is a multiple: they come last
        known = sorted(self.known.items(), key=lambda entry: entry[0] == batches)
        formed = product_form(self.graph, known, vector)
        if formed is None:
            formed = self.from_image(vector)
        return whole_form(self.graph, known, vector) if formed is None else formed

    def _whole_donors(self) -> Iterator[tuple[Vector, Emit]]:
        """Whole numbers that the model computed and the graph can compute, too."""
        for vector in list(self.donors):
            emitted = self._expression(vector) if all(isinstance(value, int) for value in vector) else None
            if emitted is not None:
                yield vector, _given(emitted)

    def _extreme(self, vector: Vector, given: tuple[Term | None, ...]) -> Any:
        """``max`` or ``min`` of something that the model computed and a constant, of which a forward sees one alone."""
        constants = {value for value, term in zip(vector, given, strict=True) if term is None}
        if len(constants) != 1:
            return None
        (constant,) = constants
        everywhere = self._everywhere(given)
        emitted = self._emitted(given)
        if everywhere is None or emitted is None:
            return None
        for function in (torch.sym_max, torch.sym_min):
            if all(function(number, constant) == value for number, value in zip(everywhere, vector, strict=True)):
                return self.graph.call_function(function, (emitted, constant))
        return None

    def _everywhere(self, terms: tuple[Any, ...]) -> Vector | None:
        """What the model would have computed on every look, those too on which it did not come to it; None if the graph
        does not know the values that it asked for their extents."""
        seen = [term for term in terms if term is not None]
        if len(set(map(kind_of, seen))) > 1:
            return None
        if isinstance(seen[0], Arithmetic):
            operands = [self._everywhere(each) for each in operands_of(terms)]
            if None in operands:
                return None
            return tuple(seen[0].function(*each) for each in zip(*operands, strict=True))
        if not isinstance(seen[0], Side):
            return (seen[0],) * len(terms) if len(set(seen)) == 1 else None
        asked = self._asked(terms, self._vector(terms))
        argument = self._argument(terms)
        if argument is not None:
            return tuple(each.meta["value"] for each in (argument, *self.twins[argument]))
        return None if asked is None else self.extents[asked[0]][0][asked[1]]

    def _emitted(self, terms: tuple[Any, ...]) -> Any:
        """What the model computed, computed again from what the graph knows; None if that is not enough. A look that
        did not come to it has None for a term."""
        vector = self._vector(terms)
        if not self._moves(terms):
            return first_known(vector)
        seen = [term for term in terms if term is not None]
        kinds = set(map(kind_of, seen))
        if len(kinds) > 1 and any(is_number(term) for term in seen):
            own = tuple(None if is_number(term) else term for term in terms)
            return None if None in vector else self._extreme(vector, own)
        argument = self._argument(terms)
        if argument is not None:
            return argument
        if all(map(is_number, seen)) and len(set(seen)) < 3:  # of lost origin: any two are explained by accident
            return None
        if not all(isinstance(term, Arithmetic) for term in seen):
            extent = self._extent(terms, vector)
            if extent is not None or None in vector or self._comes_later(terms):
                return extent
            return self._expression(vector)
        if len(kinds) > 1:
            return None
        if terms not in self.written:
            operands = [self._emitted(each) for each in operands_of(terms)]
            if any(operand is None for operand in operands):
                return None
            self.written[terms] = self.graph.call_function(seen[0].function, tuple(operands))
            if None not in vector:
                self._learn(vector, lambda: self.written[terms])
        return self.written[terms]

    def _argument(self, terms: tuple[Any, ...]) -> Node | None:
        """The number that the module is given, if that is what the model computed."""
        for place, leaf in enumerate(self.outlined[0].leaves):
            given = [each.call.sizes[place] for each in self.outlined]
            if any(term is not None for term in terms) and all(
                term is None or (own is not None and own == term) for term, own in zip(terms, given, strict=True)
            ):
                return leaf
        return None

    def _extent(self, sides: tuple[Any, ...], vector: Vector) -> Any:
        """The extent of the very value that the model asked for it, if the graph has it by now."""
        found = self._asked(sides, vector)
        return None if found is None else self.extents[found[0]][1][found[1]]()

    def _comes_later(self, sides: tuple[Any, ...]) -> bool:
        """Whether the graph makes the value that the model asked, and has not done so yet."""
        asked = ((look, side.node) for look, side in enumerate(sides) if isinstance(side, Side) and side.node)
        values = (self.place[look].get(made) for look, node in asked for made in self.outlined[look].made.get(node, []))
        return any(value in self.awaited for value in values)

    def _asked(self, sides: tuple[Any, ...], vector: Vector) -> tuple[Node, int] | None:
        """The value whose extent it is, and the axis."""
        for look, side in enumerate(sides):
            if not isinstance(side, Side) or side.node is None:
                continue
            for made in self.outlined[look].made.get(side.node, []):
                node = self.place[look].get(made)
                extents = self.extents[node][0] if node in self.extents else []
                if node is not None and side.axis < len(extents) and agree(extents[side.axis], vector):
                    return node, side.axis
        return None

    def _moves(self, terms: tuple[Any, ...]) -> bool:
        """Whether any extent that they are computed from moves, as far as it was seen."""
        seen = [term for term in terms if term is not None]
        if len(set(map(kind_of, seen))) > 1:  # computed in several ways
            return True
        if seen and isinstance(seen[0], Arithmetic):
            return any(self._moves(each) for each in operands_of(terms))
        vector = [value for value in self._vector(terms) if value is not None]
        if len(set(vector)) > 1 or (len(vector) == 1 and isinstance(seen[0], Side)):
            return True
        asked = self._asked(terms, self._vector(terms))  # the extents of what it computes may just have met
        return asked is not None and asked[0].op != "placeholder"

    def _vector(self, terms: tuple[Any, ...]) -> Vector:
        return tuple(value_of(term) for term in terms)

    @staticmethod
    def _own_terms(first: Outlined, others: list[Outlined]) -> Iterator[tuple[Term, ...]]:
        """What the module's own code, and that of what gave it its sizes, computed from sizes, on every look."""
        records = [each.capture.sizes.terms for each in (first, *others)]
        if len({len(record) for record in records}) == 1:
            lists = [[term for _, term in record] for record in records]
        else:
            lists = [
                [term for position, term in each.capture.sizes.terms if each.call.encloses(position)]
                for each in (first, *others)
            ]
            if len({len(each) for each in lists}) != 1:
                return
        yield from dict.fromkeys(zip(*lists, strict=True))


def _given(value: Any) -> Emit:
    return lambda: value


def _once(emit: Emit) -> Emit:
    """The same graph value every time: it was written before whatever asks for it later."""
    made: list[Any] = []

    def value() -> Any:
        if not made:
            made.append(emit())
        return made[0]

    return value
