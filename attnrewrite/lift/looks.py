"""The sites of a model on several looks at it: what they have in common, and how their maps follow the image."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from ..capture import ModuleCall, image_sides
from ..graph.dataflow import Dataflow
from ..graph.values import is_call, operator_name, shape_of
from ..ir.image_map import ImageMap, ImageSize, Sides
from ..ir.sites import AttentionSite, Grid, MapGroups, Projection, Reduced, Site


@dataclass
class Look:
    """Another look at the model, and the counterparts of the first look's sites, by ``id``; what it shows otherwise is
    missing, with the reason in ``differs``."""

    flow: Dataflow
    sites: dict[int, Site] = field(default_factory=dict)
    differs: dict[int, str] = field(default_factory=dict)

    def counterpart(self, node: Node, first: Dataflow) -> Node:
        """As ``counterpart``, of a node of the ``first`` graph."""
        return counterpart(node, first, self.flow)

    def call(self, call: ModuleCall, first: Dataflow) -> ModuleCall:
        """As ``same_call``, of a call on the ``first`` look."""
        return same_call(call, first, self.flow)


def counterpart(node: Node, one: Dataflow, other: Dataflow) -> Node:
    """The node that stands in the ``other`` graph where ``node`` stands in ``one``: the same operator, as many before
    it in the same call.

    Raises:
        LookupError: there is none.
    """
    call = one.capture.enclosing_call([node])
    position = next(i for i, each in enumerate(_like(node, _own_nodes(call, one))) if each is node)
    return _like(node, _own_nodes(same_call(call, one, other), other))[position]


def same_call(call: ModuleCall, one: Dataflow, other: Dataflow) -> ModuleCall:
    """The same call of the same module.

    Raises:
        LookupError: it was not called as often.
    """
    number = next(i for i, each in enumerate(_calls_of(call.path, one)) if each is call)
    return _calls_of(call.path, other)[number]


Seen = tuple[Dataflow, list[Site]]
"""A look at a model, and what was recognized on it."""


class Looks:
    """The ``first`` look at a model, and ``others`` at other sizes; the ``sites`` as all of them show them, with maps
    that follow the image, whose ``size`` they share, and groups that explain every look.

    Args:
        sites: those of the first look.
        others: the other looks.
        other_batches: gives looks at the captured size and other batches, for what takes another course at other
            sizes; none if the model takes none.
        further: gives more looks at other sizes, for what decides by sizes or may do so unseen.
    """

    def __init__(
        self,
        first: Dataflow,
        sites: list[Site],
        others: list[Seen],
        other_batches: Callable[[], list[Seen]],
        further: Callable[[], list[Seen]],
    ) -> None:
        self.first, self.size, self._other_batches, self._further = first, ImageSize(), other_batches, further
        named = [_by_name(found) for _, found in others]
        counterparts = [[found.get(name) for found in named] for name in numbered_names(sites)]
        flows = [first, *(flow for flow, _ in others)]
        images = [sides for sides in (image_sides(flow.capture) for flow in flows) if sides]
        self.sites = [
            _settled(_with_groups(_with_maps(site, theirs, images, self.size), theirs), first)
            for site, theirs in zip(sites, counterparts, strict=True)
        ]
        self.others = [self._look(*seen) for seen in others]

    @cached_property
    def itself(self) -> Look:
        """The first look, once more."""
        return Look(self.first, {id(site): site for site in self.sites})

    @cached_property
    def other_batches(self) -> list[Look]:
        return [self._look(*seen) for seen in self._other_batches()]

    @cached_property
    def further(self) -> list[Look]:
        return [self._look(*seen) for seen in self._further()]

    def _look(self, flow: Dataflow, found: list[Site]) -> Look:
        look, named = Look(flow), _by_name(found)
        for name, site in zip(numbered_names(self.sites), self.sites, strict=True):
            other = named.get(name)
            reason = "the site is not seen there" if other is None else _otherwise(site, other, self.first, flow)
            if reason:
                look.differs[id(site)] = reason
            else:
                look.sites[id(site)] = _settled(other, flow)  # type: ignore[arg-type]  # there
        return look


def _settled(site: Site, flow: Dataflow) -> Site:
    """Groups of a map with the last value that is the same for a result: where one window is the map, what puts windows
    together changes nothing, and neither does what cuts off a padding of nothing; it is not told from what follows."""
    if not isinstance(site, AttentionSite) or not isinstance(site.keys, MapGroups) or site.nodes.result is None:
        return site
    first = node = result = site.nodes.result
    position = flow.capture.position
    while len(users := flow.live_users(node)) == 1 and flow.is_movement(users[0]):
        (node,) = users
        if not site.owner.encloses(position.get(node, -1)):
            break
        if shape_of(node) == shape_of(first):
            address = flow.provenance(node, stop=partial(operator.is_, first)).address
            if not torch.equal(address.flatten(), torch.arange(address.numel())):
                break
            result = node
    return replace(site, nodes=replace(site.nodes, result=result))


class Named(Protocol):
    """A site, or what is known of one."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


def numbered_names(sites: Iterable[Named]) -> list[tuple[str, str, int]]:
    """The module, the kind, and the number among those of one kind in one module."""
    counted: dict[tuple[str, str], int] = defaultdict(int)
    names = []
    for site in sites:
        names.append((site.name, site.kind, counted[site.name, site.kind]))
        counted[site.name, site.kind] += 1
    return names


def _by_name(sites: list[Site]) -> dict[tuple[str, str, int], Site]:
    return dict(zip(numbered_names(sites), sites, strict=True))


def _with_maps(site: Site, others: list[Site | None], images: list[Sides], size: ImageSize) -> Site:
    """Its grid, and that of its reduced keys, with the image they are maps of."""
    if any(other is None for other in others) or not images:
        return site
    grids = [each.grid for each in (site, *others)]  # type: ignore[union-attr]  # checked
    if all(grid is not None for grid in grids) and len({grid.prefix_tokens for grid in grids}) == 1:  # type: ignore[union-attr]  # checked
        site = replace(site, grid=replace(grids[0], image=_image_map(size, images, grids)))  # type: ignore[type-var]  # a grid
    keys = [each.keys if isinstance(each, AttentionSite) else None for each in (site, *others)]
    if isinstance(site, AttentionSite) and all(isinstance(key, Reduced) for key in keys):
        site = replace(site, keys=replace(keys[0], image=_image_map(size, images, keys)))  # type: ignore[type-var, arg-type]  # reduced
    return site


def _image_map(size: ImageSize, images: list[Sides], maps: Iterable[Any]) -> ImageMap:
    return ImageMap(size, tuple(images), tuple((each.height, each.width) for each in maps))


def _with_groups(site: Site, others: list[Site | None]) -> Site:
    """Windows of which one look shows more than another: whether they are shifted, what stands beyond the border."""
    if not isinstance(site, AttentionSite) or not isinstance(site.keys, MapGroups) or site.grid is None:
        return site
    seen = [(each.keys, each.grid) for each in (site, *others) if isinstance(each, AttentionSite)]
    for keys in dict.fromkeys(keys for keys, _ in seen if isinstance(keys, MapGroups)):
        if all(isinstance(own, MapGroups) and grid and _same_groups(keys, own, grid) for own, grid in seen):
            return replace(site, keys=keys)
    return site


def _same_groups(one: MapGroups, other: MapGroups, grid: Grid) -> bool:
    first, second = one.slots(grid), other.slots(grid)
    return first.shape == second.shape and bool(torch.equal(_sorted(first), _sorted(second)))


def _sorted(slots: Tensor) -> Tensor:
    """Groups in an order of their own: a shift may make the last one the first."""
    kept = slots[(slots >= 0).any(1)]
    return kept[kept.max(1).values.argsort()]


def _otherwise(site: Site, other: Site, first: Dataflow, flow: Dataflow) -> str:
    """What a site is on another look that it is not on the first; an empty string if nothing."""
    if not isinstance(site, AttentionSite) or not isinstance(other, AttentionSite):
        same = site.describe().partition(" grid")[0] == other.describe().partition(" grid")[0]
        return "" if same else f"it is {other.describe()} at another size"
    facts = {
        "its heads": lambda s: (s.heads, s.head_dim),
        "its scale": lambda s: (round(s.scale, 12), round(s.scale_of_operands, 12), len(s.learned_scales)),
        "what acts on its queries and keys": lambda s: (s.qk, *(_norm(norm) for norm in (s.query_norm, s.key_norm))),
        "its dropout": lambda s: s.dropout,
        "its bias": lambda s: None if s.bias is None else s.bias.kind,
        "its mask": lambda s: s.mask is None,
        "the kind of its keys": lambda s: type(s.keys),
        "the tokens that query": lambda s: (
            None if s.queries is None or len(s.queries) == s.source_tokens else len(s.queries)
        ),
    }
    for what, fact in facts.items():
        if fact(site) != fact(other):
            return f"{what} at another size"
    if isinstance(site.keys, MapGroups) and any(_rolls_by_sizes(node, first) for node in _between(site, first)):
        return "a roll of its tokens, by an amount that comes from the map"
    if isinstance(site.keys, MapGroups) and not _same_groups(site.keys, other.keys, other.map_grid):  # type: ignore[arg-type]  # of one kind
        return "its groups at another size"
    for part in ("query", "key", "value", "output"):
        if not _same_rows(getattr(site, part), getattr(other, part), first, flow):
            return f"its {part} projection at another size"
    return ""


def _between(site: AttentionSite, flow: Dataflow) -> list[Node]:
    return flow.ancestors(site.result, stop=partial(operator.is_, site.source))


def _rolls_by_sizes(node: Node, flow: Dataflow) -> bool:
    """Whether the model computes from sizes how far it rolls: what that makes of windows on another map is not seen."""
    if operator_name(node) != "aten::roll" or node not in flow.capture.position:
        return False
    given = flow.capture.sizes.given_at(flow.capture.position[node])
    return given is not None and any(term is not None for _, term in given.numbers)


def _norm(norm: Any) -> Any:
    return None if norm is None else (norm.kind, norm.place, norm.eps)


def _same_rows(one: Projection | None, other: Projection | None, first: Dataflow, flow: Dataflow) -> bool:
    if one is None or other is None:
        return one is other
    pairs = [(one.weight, other.weight), (one.bias, other.bias)]
    if not torch.equal(one.rows, other.rows):
        return False
    return all(a is b if a is None or b is None else _same_value(first.weights(a), flow.weights(b)) for a, b in pairs)


def _same_value(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))


def _calls_of(path: str, flow: Dataflow) -> list[ModuleCall]:
    return [call for call in flow.capture.root.walk() if call.path == path]


def _own_nodes(call: ModuleCall, flow: Dataflow) -> list[Node]:
    position = flow.capture.position
    inside = [node for node, place in position.items() if is_call(node) and call.encloses(place)]
    inside = [node for node in inside if not any(child.encloses(position[node]) for child in call.children)]
    return sorted(inside, key=position.__getitem__)


def _like(node: Node, nodes: list[Node]) -> list[Node]:
    return [other for other in nodes if operator_name(other) == operator_name(node)]
