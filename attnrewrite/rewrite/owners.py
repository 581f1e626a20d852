"""From converted sites to the programs of the modules that own them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, fx, nn
from torch.fx import Node

from ..capture import Capture, ModuleCall, NodeRef
from ..errors import UNFORESEEN, Refusal, unforeseen
from ..graph.dataflow import Dataflow
from ..graph.values import needed_nodes
from ..ir.contract import BetweenProjections, Conversion, WholeSite
from ..ir.image_map import ImageSize
from ..ir.sites import AttentionSite, Grid, Site
from ..lift.looks import Look, Looks
from .attention_weights import Reader, exchange_weights
from .dead_code import remove_dead_code
from .droppable import is_droppable
from .follow_sizes import follow_sizes
from .hooks import has_hooks
from .install import install, must_open, whole_ends
from .outline import Outlined, lies_in, outline
from .program import Program, program_of
from .rewritten import rewrite_module, tell_of_hooks

ConversionOf = Callable[[Site], Conversion]


@dataclass
class OwnerProgram:
    """The new forward of one ``module``: at ``path``, replacing ``sites``, with the children and buffers it needs.

    ``dropped`` are children and parameters that nothing uses any more, and ``lost`` the sizes of those parameters by
    identity. ``fixed_to`` says what holds for the captured size only; ``handed_on`` whether a child with a life of its
    own is an identity in eval mode; ``passes_over`` whether it is given a constant that it no longer uses, and
    ``reads_image`` whether it asks for the image that the model was given. ``live`` are the paths of children that are
    still called as they were, and ``dissolved`` those, below the module's own, of the modules that are not called.
    """

    call: ModuleCall
    module: nn.Module
    sites: list[Site]
    program: Program
    modules: dict[str, nn.Module]
    buffers: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    fixed_to: list[str] = field(default_factory=list)
    handed_on: bool = False
    passes_over: bool = False
    reads_image: bool = False
    live: frozenset[str] = frozenset()
    dissolved: list[str] = field(default_factory=list)
    donor_class: type = field(init=False)
    lost: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.donor_class = type(self.module)
        gone = [parameter for path in self.dropped for parameter in _parameters_at(self.module, path)]
        self.lost = {id(parameter): parameter.numel() for parameter in gone}

    @property
    def path(self) -> str:
        return self.call.path

    def install(self, module: nn.Module, targets: Iterable[str] = ()) -> None:
        """Rewrite ``module``, the owner or a copy of it, with cores of its own."""
        parts = copy.deepcopy(self.modules), copy.deepcopy(self.buffers)
        rewrite_module(module, self.program, *parts, self.dropped, targets)
        tell_of_hooks(module, self.path, self.dissolved)


def build_programs(
    donor: Capture, sites: list[Site], looks: Looks, conversion_of: ConversionOf
) -> tuple[list[OwnerProgram], list[tuple[Site, Refusal]]]:
    """One program for every owning module of the ``donor``, and the sites that cannot be rewritten, with the reason."""
    programs: list[OwnerProgram] = []
    failed: list[tuple[Site, Refusal]] = []
    flow = looks.first
    for calls in _by_module(_owners(sites, flow, conversion_of)):
        built = []
        for call, owned in calls:
            program, without = build_program(donor, call, owned, looks, conversion_of)
            failed += without
            built += [program] if program is not None else []
        count = sum(1 for other in flow.capture.root.walk() if other.path == calls[0][0].path)
        reason = _disagreement(built, count)
        if reason:
            failed += [(site, Refusal(reason)) for program in built for site in program.sites]
        elif built:
            programs.append(built[0])
    return programs, failed


def build_program(
    donor: Capture, call: ModuleCall, sites: list[Site], looks: Looks, conversion_of: ConversionOf
) -> tuple[OwnerProgram | None, list[tuple[Site, Refusal]]]:
    """The program of one module call; sites that cannot be rewritten are left out, one by one, with the reason."""
    failed: list[tuple[Site, Refusal]] = []
    while sites:
        try:
            return _program(donor, call, sites, looks, conversion_of), failed
        except _NotInstalled as without:
            blamed = [(without.site, _refusal(call, without.__cause__))]
        except (Refusal, *UNFORESEEN) as cause:
            blamed = _blamed(donor, call, sites, looks, conversion_of)
            blamed = blamed or [(site, _refusal(call, cause)) for site in sites]
        failed += blamed
        out = {id(site) for site, _ in blamed}
        sites = [site for site in sites if id(site) not in out]
    return None, failed


def _blamed(
    donor: Capture, call: ModuleCall, sites: list[Site], looks: Looks, conversion_of: ConversionOf
) -> list[tuple[Site, Refusal]]:
    """Of several sites that cannot be rewritten together, though each could be installed: those that cannot be alone,
    with the reason."""
    blamed: list[tuple[Site, Refusal]] = []
    for site in sites if len(sites) > 1 else ():
        try:
            _program(donor, call, [site], looks, conversion_of)
        except (Refusal, _NotInstalled, *UNFORESEEN) as cause:
            blamed.append((site, _refusal(call, cause.__cause__ if isinstance(cause, _NotInstalled) else cause)))
    return blamed


def _program(
    donor: Capture, call: ModuleCall, sites: list[Site], looks: Looks, conversion_of: ConversionOf
) -> OwnerProgram:
    """The program with all of ``sites`` rewritten.

    Raises:
        _NotInstalled: one of them cannot be installed.
        Refusal: the module cannot be rewritten with them.
    """
    outlined, before = _outlined(donor, call, sites, looks.first, conversion_of)
    again = partial(_outlined_again, donor, call, sites, looks, conversion_of=conversion_of)
    outlined = follow_sizes(outlined, looks, again)
    remove_dead_code(outlined.graph)
    dissolved = _dissolved(outlined)
    _require_no_decisions(outlined)
    program = program_of(outlined)
    used = set(_parts_used(outlined.graph))
    modules = {name: module for name, module in outlined.modules.items() if name in used}
    buffers = {name: value for name, value in outlined.constants.items() if name in used}
    read = {part for name in used for part in itertools.accumulate(name.split("."), "{}.{}".format)}
    called = {str(node.target) for node in outlined.graph.nodes if node.op == "call_module"}
    unread = [name for name in before if name not in read and not lies_in(name, called)]
    return OwnerProgram(
        call,
        outlined.module,
        sites,
        program,
        modules,
        buffers,
        dropped=[name for name in unread if is_droppable(name, outlined)],
        fixed_to=outlined.tied,
        handed_on=outlined.handed_on,
        passes_over=bool(outlined.passed_over()),
        reads_image=any(map(_reads_image, modules.values())),
        live=frozenset(child.path for child in outlined.live) - {child.path for child in _moved(outlined)},
        dissolved=dissolved,
    )


def _outlined(
    donor: Capture, call: ModuleCall, sites: list[Site], flow: Dataflow, conversion_of: ConversionOf
) -> tuple[Outlined, list[str]]:
    """The call's graph with ``sites`` installed, and the parts of the module that its own graph used before."""
    outlined = outline(call, donor, flow, _opener(sites, conversion_of))
    before = _parts_used(outlined.graph)
    readers: list[tuple[AttentionSite, Reader | None]] = []
    for site in sites:
        with _naming(site):
            reader = install(outlined, site, conversion_of(site))
        if isinstance(site, AttentionSite):
            readers.append((site, reader))
    remove_dead_code(outlined.graph)
    for site, reader in readers:
        with _naming(site):
            exchange_weights(outlined, site, reader, _keeps_weights(conversion_of(site)))
    remove_dead_code(outlined.graph)
    return outlined, before


def _keeps_weights(conversion: Conversion) -> bool:
    return isinstance(conversion, BetweenProjections) and conversion.core.keeps_weights


def _dissolved(outlined: Outlined) -> list[str]:
    """The paths below the module of children that it does not call any more.

    Raises:
        Refusal: one of them has hooks.
    """
    paths: dict[str, None] = {}
    for call in outlined.dissolved():
        path = outlined.relative(call.path)
        if has_hooks(outlined.donor.module_of(call)):
            raise Refusal(f"hooks on its child {path} would no longer fire")
        paths[path] = None
    return list(paths)


def _moved(outlined: Outlined) -> list[ModuleCall]:
    """Calls of children that are given another value than they were."""
    return [child for child in outlined.live if outlined.relative(child.path) in outlined.moved]


def _require_no_decisions(outlined: Outlined) -> None:
    """Raises:
    Refusal: a child that is given another value, of another size, decides anything by sizes.
    """
    for child in _moved(outlined):
        inside = set(map(id, child.walk()))
        decision = next((each for each in outlined.capture.sizes.decisions if id(each.call) in inside), None)
        if decision is not None:
            raise Refusal(
                f"its child {outlined.relative(child.path)} would receive a whole map, and depends on {decision}"
            )


@contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Say which of several sites cannot be installed."""
    try:
        yield
    except (Refusal, *UNFORESEEN) as cause:
        raise _NotInstalled(site) from cause


class _NotInstalled(Exception):
    """One of several sites could not be installed, for the cause."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site


def _outlined_again(
    donor: Capture, call: ModuleCall, sites: list[Site], looks: Looks, look: Look, conversion_of: ConversionOf
) -> Outlined:
    """The same on another look.

    Raises:
        LookupError, Refusal: it is not the same there.
    """
    conversions: dict[int, Conversion] = {}
    others: list[Site] = []
    for site in sites:
        if id(site) not in look.sites:
            raise LookupError(look.differs[id(site)])
        others.append(look.sites[id(site)])
        conversions[id(others[-1])] = _at(look, others[-1], conversion_of(site), looks)
    try:
        there = look.call(call, looks.first)
        outlined, _ = _outlined(donor, there, others, look.flow, lambda site: conversions[id(site)])
    except _NotInstalled as failed:
        raise failed.__cause__ or failed from None
    return outlined


def _at(look: Look, site: Site, conversion: Conversion, looks: Looks) -> Conversion:
    """The same conversion, of the site as another look shows it."""
    if not isinstance(conversion, WholeSite):
        return conversion
    until = conversion.until and look.counterpart(conversion.until, looks.first)
    adapter = conversion.adapter and conversion.adapter.at(site.grid)
    return replace(conversion, until=until, adapter=adapter)


def _reads_image(module: nn.Module) -> bool:
    """Whether it takes the sides of a map, or of the image, from the image that the model was given."""
    held = [value for part in module.modules() for value in vars(part).values()]
    return any(isinstance(value, ImageSize) or (isinstance(value, Grid) and value.image) for value in held)


def _refusal(call: ModuleCall, cause: BaseException | None) -> Refusal:
    kind = call.kind.rpartition(".")[2]
    if isinstance(cause, Refusal):
        return Refusal(f"{kind} cannot be rewritten: {cause.reason}", cause.remedy)
    return Refusal(f"{kind}: {unforeseen(cause)}")  # type: ignore[arg-type]  # it was raised


def _parts_used(graph: fx.Graph) -> list[str]:
    """Children that are called, and parameters and buffers that are read."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")))


def _parameters_at(module: nn.Module, path: str) -> list[nn.Parameter]:
    """The parameters of a child, or the one that has this name."""
    parent, _, name = path.rpartition(".")
    own = module.get_submodule(parent)._parameters.get(name)
    return list(module.get_submodule(path).parameters()) if own is None else [own]


def _opener(sites: list[Site], conversion_of: ConversionOf) -> Callable[[ModuleCall], bool]:
    inner: list[Node] = []
    shown: list[Node] = []
    for site in sites:
        inside, either = must_open(site, conversion_of(site))
        inner += inside
        shown += either

    def opened(call: ModuleCall) -> bool:
        return any(_holds(call, node) for node in inner) or any(
            _holds(call, node) and not (isinstance(call.output, NodeRef) and call.output.node is node) for node in shown
        )

    positions: dict[Node, int] = {}

    def _holds(call: ModuleCall, node: Node) -> bool:
        if node not in positions:
            positions[node] = node.meta["custom"]["attnrewrite_position"]
        return call.encloses(positions[node])

    return opened


def _owner(site: Site, conversion: Conversion, flow: Dataflow) -> ModuleCall:
    """The smallest module call in which the site can be replaced; with its projections, where those go too."""
    if not isinstance(conversion, WholeSite) or (conversion.until is None and not isinstance(site, AttentionSite)):
        return site.owner
    source, result = whole_ends(site, conversion)
    return flow.capture.enclosing_call([n for n in needed_nodes([result], {source: 0}) if n not in flow.constants])


def _owners(sites: list[Site], flow: Dataflow, conversion_of: ConversionOf) -> list[tuple[ModuleCall, list[Site]]]:
    """Sites by the call that owns them; a site inside a child that another site dissolves joins that one's owner."""
    owners: dict[int, tuple[ModuleCall, list[Site]]] = {}
    for site in sites:
        owner = _owner(site, conversion_of(site), flow)
        owners.setdefault(id(owner), (owner, []))[1].append(site)
    for outer, owned in sorted(owners.values(), key=lambda entry: entry[0].enter - entry[0].exit):
        for inner, theirs in list(owners.values()):
            if inner is outer or not theirs or not _is_inside(inner, outer):
                continue
            opened = _opener(owned, conversion_of)
            if all(opened(step) for step in _steps_between(inner, outer)):
                owned += theirs
                del owners[id(inner)]
    return [entry for entry in owners.values() if entry[1]]


def _steps_between(inner: ModuleCall, outer: ModuleCall) -> Iterator[ModuleCall]:
    while inner is not outer:
        yield inner
        assert inner.parent is not None
        inner = inner.parent


def _is_inside(inner: ModuleCall, outer: ModuleCall) -> bool:
    call: ModuleCall | None = inner
    while call is not None and call is not outer:
        call = call.parent
    return call is outer


def _by_module(
    owners: list[tuple[ModuleCall, list[Site]]],
) -> list[list[tuple[ModuleCall, list[Site]]]]:
    modules: dict[str, list[tuple[ModuleCall, list[Site]]]] = {}
    for call, sites in owners:
        modules.setdefault(call.path, []).append((call, sites))
    return list(modules.values())


def _disagreement(built: list[OwnerProgram], calls: int) -> str:
    """A module that is called several times must be the same rewritten module every time."""
    if not built or calls == 1:
        return ""
    if len(built) != calls or any(program.program.source != built[0].program.source for program in built):
        return f"its module is called {calls} times and would have to be rewritten differently each time"
    return ""
