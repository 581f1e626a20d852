"""Attention weights that a module uses beside its product with the values, most of all to return them: the donor's are
not those of a new operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from ..errors import ConversionError, Refusal
from ..ir.heads import from_heads_last
from ..ir.sites import AttentionSite, Operand
from .outline import Outlined

Reader = Callable[[], Node]
"""Adds to the graph what computes the new operator's weights, heads-last ``[batch, queries, heads, keys]``."""


class Unavailable:
    """Stands where a converted module would return attention weights; any use of it says why it has none."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # copying, pickling and inspection ask for these
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse()

    @classmethod
    def _refuse(cls, *_: Any) -> NoReturn:
        raise ConversionError(
            "this module's attention was converted, and its new attention weights are not computed: convert the model "
            "with example inputs that make it return them (for transformers output_attentions=True, with eager "
            "attention); where the new operator has none, exclude the module with keep=, or revert the model"
        )


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "getitem",
    "setitem", "len", "iter", "float", "int", "bool", "array", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(Unavailable, f"__{_name}__", Unavailable._refuse)


def unavailable() -> Unavailable:
    return Unavailable()


def unit_mixture(core: nn.Module, query: Tensor, key: Tensor, *terms: Tensor) -> Tensor:
    """``[batch, queries, heads, keys]``: the weights that ``core`` gives to the keys, without dropout.

    A core that does nothing to its values but weigh them shows its weights on unit vectors, as many at once as a head
    has dimensions.
    """
    keys, width = key.shape[1], key.shape[-1]
    units = torch.eye(keys, dtype=key.dtype, device=key.device)
    training = core.training
    core.train(False)
    try:
        columns = units.split(width, dim=1)
        parts = [core(query, key, _spread(part, key, width), *terms)[..., : part.shape[1]] for part in columns]
    finally:
        core.train(training)
    return torch.cat(parts, dim=-1)


def _spread(units: Tensor, key: Tensor, width: int) -> Tensor:
    """One value ``[keys, units]`` for all samples and heads, padded to the width of a head."""
    padded = nn.functional.pad(units, (0, width - units.shape[1]))
    return padded[None, :, None].expand(*key.shape).contiguous()


def exchange_weights(outlined: Outlined, site: AttentionSite, read: Reader | None, keeping: bool) -> None:
    """Give what still uses a site's old weights, beside their product with the values, those of the new operator; none
    are to be exchanged where that is ``keeping`` the old ones.

    Weights that the captured call never looks at, or that the new operator does not have (``read`` is None) and that
    the model returns, are not computed: a stand-in is returned for them.

    Raises:
        Refusal: the model computes with weights that the new operator does not have, or with dropout on them.
    """
    weights = site.nodes.weights
    if weights is None:
        return
    viewers = _viewers(outlined, site, weights.node)
    if viewers and site.dropout > 0:
        raise Refusal(
            "the model reads its attention weights, and in training their dropout would be drawn a second time "
            "for them",
            "build the model without attention dropout",
        )
    for node in [made for made in outlined.made.get(weights.node, []) if made in outlined.graph.nodes]:
        if keeping:
            continue
        if viewers and read is not None:
            _exchange(outlined, site, weights, node, read)
        elif all(viewer.op == "output" for viewer in viewers):
            _hide(outlined, node)
        else:
            raise Refusal("the model computes with its attention weights, which the new operator does not produce")


def _viewers(outlined: Outlined, site: AttentionSite, weights: Node) -> set[Node]:
    """Captured nodes outside of the module, or the captured output, that look at ``weights`` or what is made of them
    beside their product with the values."""
    viewers: set[Node] = set()
    pending, seen = [weights], {weights, site.nodes.output.node}
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or not outlined.call.encloses(outlined.capture.position.get(user, -1)):
                viewers.add(user)
            elif user not in seen:
                pending.append(user)
                seen.add(user)
    return viewers


def _exchange(outlined: Outlined, site: AttentionSite, weights: Operand, old: Node, read: Reader) -> None:
    nodes, graph = site.nodes, outlined.graph
    axes = weights.axes.replace("y", "e")  # a weight for every key, as the values have a dimension
    with graph.inserting_before(old.next):
        groups = (nodes.batch_groups, nodes.head_groups, site.head_sizes)
        new = graph.call_function(from_heads_last, (read(), axes, *groups))
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)


def _hide(outlined: Outlined, weights: Node) -> None:
    """Return a stand-in for whatever is made of the weights."""
    made = {weights}
    for node in outlined.graph.nodes:
        if made & set(node.all_input_nodes):
            made.add(node)
    output = next(node for node in outlined.graph.nodes if node.op == "output")
    if not made & set(output.all_input_nodes):
        return
    with outlined.graph.inserting_before(output):
        stand_in = outlined.graph.call_function(unavailable)
    output.args = fx.node.map_arg(output.args, lambda node: stand_in if node in made else node)
