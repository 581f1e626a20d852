"""Where a converted model can be calibrated: output projections that add to a residual stream, found at planning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..capture import ModuleCall, NodeRef
from ..errors import Refusal
from ..graph.dataflow import Dataflow
from ..graph.values import argument, input_of, operator_name, shape_of
from ..ir.contract import BetweenProjections, Conversion, WholeSite
from ..ir.core import Operands
from ..ir.sites import AttentionSite, MlpSite, Site
from ..rewrite.owners import OwnerProgram
from .planned_site import PlannedSite

_RESHAPES = {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::flatten", "aten::unflatten"}


@dataclass(frozen=True)
class Tap:
    """Leaf number ``leaf`` of the arguments, or of the result, of the module at ``path``."""

    path: str
    leaf: int = 0
    result: bool = False


@dataclass(frozen=True)
class LinearMap:
    """An output projection: its parameters by name, and where its input can be read in the converted model.

    ``columns``: the input is read as a core gives it, heads and their dimensions last, and its element ``i`` is column
    ``columns[i]`` of the weight. Without any it is read as it is.
    """

    weight: str
    bias: str | None
    input: Tap
    columns: tuple[int, ...] = ()

    def rows(self, value: Tensor) -> Tensor:
        """``[images, tokens, columns of the weight]`` of what was read at ``input``."""
        if not self.columns:
            return tokens(value)
        return tokens(value.flatten(-2))[..., torch.argsort(torch.tensor(self.columns, device=value.device))]


@dataclass(frozen=True)
class ValueHeads:
    """The value projection of a site: its parameters by name, ``rows[head][dim]`` of the weight for every head,
    ``columns`` of the output projection that read that head, and the module at ``owner`` between the two."""

    weight: str
    bias: str | None
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    owner: str


@dataclass(frozen=True)
class Place:
    """One output projection: ``after = before + scale * projection(its input)``, in both models.

    ``before`` and ``after`` are where the residual stream can be read. ``scale`` names the layer scale's parameter.
    ``owner`` is the path of the module that a conversion rewrote, if one did. ``why`` says why the place cannot be
    calibrated; then the rest may be missing.
    """

    name: str
    kind: str
    owner: str | None = None
    projection: LinearMap | None = None
    before: Tap | None = None
    after: Tap | None = None
    scale: str | None = None
    value: ValueHeads | None = None
    why: str = ""


def tokens(value: Tensor) -> Tensor:
    """``[images, tokens, channels]`` of a map or a list of tokens, channels last."""
    return value.flatten(1, -2) if value.dim() > 2 else value[:, None]


def find_places(
    model: nn.Module, flow: Dataflow, sites: Iterable[PlannedSite], programs: Iterable[OwnerProgram]
) -> list[Place]:
    """All attention sites that ``programs`` rewrite in ``model``, all MLPs and the classifier, in forward order."""
    graph = _Residuals(model, flow)
    owners = {id(site): owner for owner in programs for site in owner.sites}
    places: list[tuple[int, Place]] = []
    for planned in sites:
        site = planned.site
        if not isinstance(site, AttentionSite | MlpSite):
            continue
        owner = owners.get(id(site))
        if isinstance(site, AttentionSite) and owner is None:
            continue
        conversion = planned.conversion if planned.converting else None
        position = (site.nodes.output.node if isinstance(site, AttentionSite) else site.second).meta["custom"]
        place = graph.place(site, owner, conversion)
        if isinstance(conversion, BetweenProjections) and conversion.core.operands is Operands.TOKENS:
            place = replace(place, value=None)  # its value projection is the core's own
        places.append((position["attnrewrite_position"], place))
    ordered = [place for _, place in sorted(places, key=lambda entry: entry[0])]
    return ordered + graph.classifier()


@dataclass
class _Residuals:
    """Follows values of a model's captured graph along the residual stream."""

    model: nn.Module
    flow: Dataflow
    calls: list[ModuleCall] = field(init=False)
    counts: Counter[str] = field(init=False)
    linears: dict[str, nn.Linear] = field(init=False)
    taps: dict[Node, tuple[int, Tap]] = field(init=False)

    def __post_init__(self) -> None:
        self.calls = list(self.flow.capture.root.walk())
        self.counts = Counter(call.path for call in self.calls)
        modules = self.model.named_modules()
        self.linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}
        self.taps = self._first_taps()

    def place(self, site: Site, owner: OwnerProgram | None, conversion: Conversion | None) -> Place:
        place = Place(site.name, site.kind, None if owner is None else owner.path)
        try:
            if isinstance(conversion, WholeSite):
                raise Refusal("its output projection was replaced")
            assert isinstance(site, AttentionSite | MlpSite)
            out_proj = site.nodes.out_proj if isinstance(site, AttentionSite) else site.second
            start = site.nodes.result if isinstance(site, AttentionSite) else site.result
            if out_proj is None or start is None:
                raise Refusal("it has no output projection")
            projection = self._projection(site, out_proj, owner, conversion)
            scale, before, after = self._residual(start)
            place = replace(
                place, projection=projection, scale=scale, before=self._tap(before, "before"),
                after=self._tap(after, "after"),
            )  # fmt: skip
            if isinstance(site, AttentionSite) and owner is not None:
                place = replace(place, value=self._value_heads(site, owner.path))
        except Refusal as reason:
            return replace(place, why=str(reason))
        return place

    def classifier(self) -> list[Place]:
        """The linear map that gives the model's first output, if one does."""
        if not self.flow.outputs:
            return []
        try:
            head = self._linear_call(self.flow.outputs[0])
        except Refusal:
            return []
        return [Place(head.path, "classifier", None, self._called(head), None, Tap(head.path, result=True))]

    def _projection(
        self, site: Site, out_proj: Node, owner: OwnerProgram | None, conversion: Conversion | None
    ) -> LinearMap:
        """The output projection ``out_proj``: a module that is called, else a function whose input the core gives."""
        if any(_output(call) is out_proj for call in self.calls if call.path in self.linears):
            return self._called(self._linear_call(out_proj))
        names = self._parameters(out_proj)
        output = site.output if isinstance(site, AttentionSite) else None
        if names is None or output is None or owner is None or not isinstance(conversion, BetweenProjections):
            raise Refusal("its output projection is not a linear module that is called")
        core = next((name for name, module in owner.modules.items() if module is conversion.core), None)
        if core is None or self.counts[owner.path] > 1:
            raise Refusal("the input of its output projection cannot be read")
        path = f"{owner.path}.{core}" if owner.path else core
        return LinearMap(*names, Tap(path, result=True), tuple(output.rows.flatten().tolist()))

    def _parameters(self, linear: Node) -> tuple[str, str | None] | None:
        """Names of the weight and the bias of a linear map, where they are parameters as they stand."""
        if operator_name(linear) != "aten::linear":
            return None
        parameters = {id(value): name for name, value in self.model.named_parameters()}
        given = [id(self.flow.capture.tensors.get(node)) for node in linear.args[1:] if isinstance(node, Node)]
        if not all(key in parameters for key in given):
            return None
        return parameters[given[0]], parameters[given[1]] if len(given) > 1 else None

    def _linear_call(self, node: Node) -> ModuleCall:
        """The one call of a linear module that computes ``node``."""
        for call in self.calls:
            if call.path in self.linears and _output(call) is node:
                if self._called_once(call):
                    return call
                raise Refusal("its output projection is called more than once")
        raise Refusal("its output projection is not a linear module that is called")

    def _residual(self, node: Node) -> tuple[str | None, Node, Node]:
        """From a branch's value on to where it is added: layer scale, stream before, stream after."""
        scale: str | None = None
        while True:
            users = self.flow.live_users(node)
            if len(users) != 1:
                raise Refusal("its result is used more than once before it is added to the stream")
            (user,) = users
            if operator_name(user) == "aten::add" and len(user.args) == 2 and not user.kwargs:
                other = next((arg for arg in user.args if arg is not node), None)
                if isinstance(other, Node) and other not in self.flow.constants and _width(other) == _width(node):
                    return scale, other, user
                raise Refusal("what its result is added to is not a residual stream")
            if operator_name(user) == "aten::mul" and scale is None:
                scale = self._layer_scale(user, node)
            elif not self._keeps_order(user):
                raise Refusal(f"{operator_name(user)} stands between its result and the residual stream")
            node = user

    def _layer_scale(self, product: Node, value: Node) -> str:
        other = next((arg for arg in product.args if arg is not value), None)
        if isinstance(other, Node) and other in self.flow.learned:
            source = self.flow.provenance_of_constant(other)
            vector = self.flow.capture.tensors.get(source)
            for name, parameter in self.model.named_parameters():
                if parameter is vector and parameter.numel() == _width(value) == self.flow.constants[other].shape[-1]:
                    return name
        raise Refusal("its result is multiplied by something other than a layer scale")

    def _keeps_order(self, node: Node) -> bool:
        """A copy, a reshape of everything before the channels, or a permutation of axes of one element."""
        if self.flow.is_copy(node):
            return True
        if operator_name(node) == "aten::permute":
            shape = shape_of(input_of(node))
            long = [axis % len(shape) for axis in argument(node, 1) if shape[axis] > 1]
            return long == sorted(long) and _width(node) == _width(node.args[0])
        return operator_name(node) in _RESHAPES and _width(node) == _width(node.args[0])

    def _first_taps(self) -> dict[Node, tuple[int, Tap]]:
        """The best module call at which each value is seen, and its rank: as an argument, best of one without children,
        which no rewrite dissolves; else as a result."""
        given = [(call, call.arguments, False) for call in sorted(self.calls, key=lambda call: bool(call.children))]
        made = [(call, call.output, True) for call in self.calls]
        taps: dict[Node, tuple[int, Tap]] = {}
        for rank, (call, values, result) in enumerate(given + made):
            if call.parent is None or not self._called_once(call):
                continue
            for index, leaf in enumerate(tree_leaves(values)):
                if isinstance(leaf, NodeRef) and leaf.node is not None:
                    taps.setdefault(leaf.node, (rank, Tap(call.path, index, result=result)))
        return taps

    def _tap(self, node: Node, side: str) -> Tap:
        found = [self.taps[other] for other in self._same_stream(node) if other in self.taps]
        if not found:
            raise Refusal(f"no module sees the residual stream {side} it")
        return min(found, key=lambda entry: (entry[0], entry[1].leaf))[1]

    def _same_stream(self, node: Node) -> set[Node]:
        same = {node}
        pending = [node]
        while pending:
            step = pending.pop()
            near = [user for user in self.flow.live_users(step) if self._keeps_order(user)]
            near += [step.args[0]] if self._keeps_order(step) and isinstance(step.args[0], Node) else []
            fresh = [other for other in near if other not in same]
            same.update(fresh)
            pending += fresh
        return same

    def _called_once(self, call: ModuleCall) -> bool:
        return self.counts[call.path] == 1

    def _called(self, call: ModuleCall) -> LinearMap:
        bias = None if self.linears[call.path].bias is None else f"{call.path}.bias"
        return LinearMap(f"{call.path}.weight", bias, Tap(call.path))

    def _value_heads(self, site: AttentionSite, owner: str) -> ValueHeads | None:
        value, output = site.value, site.output
        if value is None or output is None or value.rows.shape != output.rows.shape:
            return None
        made = next((linear for linear in site.nodes.linears if linear.args[1] is value.weight), None)
        names = None if made is None else self._parameters(made)
        return None if names is None else ValueHeads(*names, _plain(value.rows), _plain(output.rows), owner)


def _output(call: ModuleCall) -> Node | None:
    return call.output.node if isinstance(call.output, NodeRef) else None


def _width(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else -1


def _plain(rows: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows.tolist())
