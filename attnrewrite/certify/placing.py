"""Where a site says its tokens lie, against where they lie in the operands of the captured product.

A placement is only believed as far as it is confirmed by values: operands that hold other tokens than it says differ
from the site's projections of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.contraction import canonical
from ..graph.values import shape_of
from ..ir.axes import position_and_dim
from ..ir.sites import AttentionNodes, AttentionSite, Global, MapGroups, Operand, Placement, Window
from ..lift.projections import group_sizes


def in_groups(value: Tensor, operand: Operand, nodes: AttentionNodes) -> Tensor:
    """A captured operand or output as ``[groups, positions, dim]``, the group axes of the product flattened."""
    order = nodes.groups + "".join(position_and_dim(operand.axes))
    return canonical(value, operand.axes, order).expand(*group_sizes(nodes), -1, -1).flatten(0, -3)


def heads_of_groups(site: AttentionSite) -> Tensor:
    """The head of every group; where the projections are not known the heads of a sample lie together."""
    placement = site.nodes.placement
    if placement is not None:
        return placement.heads
    return torch.arange(math.prod(group_sizes(site.nodes))) % site.heads


def misplaced(site: AttentionSite) -> str:
    """Why the tokens of the operands are not where the site says, or an empty string."""
    placement = site.nodes.placement
    if placement is None:
        return ""
    asking = _asking(site)
    if asking is None or not _is_each_once(placement, asking, site.heads):
        return "its operands hold other queries than it names, or not each once for every head"
    if isinstance(site.keys, MapGroups):
        return _misplaced_in_groups(site, site.keys, placement)
    samples = _tokens_of_samples(site.source, site.nodes.batch_axis)
    own = _sample_of_each(samples)[placement.queries[:, 0]]
    if not torch.equal(placement.queries, asking[own]):
        return "its queries lie in another order than it names"
    keys = _tokens_of_samples(site.nodes.key_source or site.source, site.nodes.batch_axis)
    if keys.shape[1] != placement.keys.shape[1] or len(keys) != len(samples):
        return f"its operands hold {placement.keys.shape[1]} keys of {keys.shape[1]} tokens"
    found = placement.keys if isinstance(site.keys, Global) else placement.keys.sort(-1).values
    expected = keys if isinstance(site.keys, Global) else keys.sort(-1).values
    return "" if torch.equal(found, expected[own]) else "its keys are other tokens than it names"


def hidden_keys(site: AttentionSite, places: Tensor | None) -> Tensor | None:
    """``[groups, queries, keys]``: the slots of other blocks, which a query does not see; None where there are none.

    ``places`` are those of the queries, None for all of them.
    """
    placement = site.nodes.placement
    if not isinstance(site.keys, MapGroups) or placement is None:
        return None
    slots, block, _ = _slots(site, site.keys)
    absent = slots == Window.ABSENT
    if not bool(absent.any()):
        return None
    queries = placement.queries if places is None else placement.queries[:, places]
    token = _within_sample(site)[queries]
    return absent[block[token.clamp(min=0)]] & (token >= 0)[..., None]


def result_rows(site: AttentionSite) -> Tensor:
    """``[groups, positions]``: which token of the result an output is of, counted through its samples (-1: none)."""
    placement, asking = site.nodes.placement, _asking(site)
    assert placement is not None
    assert asking is not None
    if site.queries is None:
        return placement.queries
    rank = torch.full((_count(site.source) + 1,), -1)
    rank[asking.flatten()] = torch.arange(asking.numel())
    return rank[placement.queries]  # the last entry is that of -1


def _misplaced_in_groups(site: AttentionSite, groups: MapGroups, placement: Placement) -> str:
    if isinstance(groups, Window) and (idle := _idle_shift(site, groups)):
        return idle
    slots, block, slot = _slots(site, groups)
    token, flat = _within_sample(site), _tokens_of_samples(site.source, site.nodes.batch_axis)
    queries = token[placement.queries]
    asks = queries >= 0
    places = torch.arange(queries.shape[1]).expand_as(queries)
    if slots.shape[1] != queries.shape[1] or not torch.equal(slot[queries[asks]], places[asks]):
        return "its tokens lie in other slots than it names"
    group = torch.arange(len(queries))[:, None].expand_as(queries)
    pairs = (group[asks] * len(slots) + block[queries[asks]]).unique()
    group, claimed = pairs // len(slots), slots[pairs % len(slots)]
    own = _sample_of_each(flat)[placement.queries.amax(1)][group]
    named = torch.where(claimed < 0, -1, flat[own[:, None], claimed.clamp(min=0)])
    wrong = (named != placement.keys[group]) & (claimed != Window.ABSENT)
    return "its groups hold other keys than it names" if bool(wrong.any()) else ""


def _idle_shift(site: AttentionSite, window: Window) -> str:
    """A shift along an axis that fits into one block, on every look at the model, shows nowhere: nothing can confirm
    it."""
    lengths = zip(*((grid.height, grid.width) for grid in site.map_grid.seen), strict=True)
    idle = any(
        shift and max(sides) <= size for shift, sides, size in zip(window.shift, lengths, window.size, strict=True)
    )
    return f"its shift cannot be seen on a {site.map_grid} map that fits into one window" if idle else ""


def _slots(site: AttentionSite, groups: MapGroups) -> tuple[Tensor, Tensor, Tensor]:
    """The token in every slot of every block, ``[blocks, slots]``, and block and slot of every token of a sample."""
    slots = groups.slots(site.map_grid)
    if site.place is not None:
        slots = torch.where(slots < 0, slots, torch.argsort(site.place)[slots.clamp(min=0)])
    block, slot = torch.nonzero(slots >= 0, as_tuple=True)
    token = slots[block, slot]
    count = max(int(token.max()) + 1, site.source_tokens)
    of_token = torch.full((2, count), -1)
    of_token[0, token], of_token[1, token] = block, slot
    return slots, of_token[0], of_token[1]


def _asking(site: AttentionSite) -> Tensor | None:
    """``[samples, queries]``: the tokens that query, by flat position; None if the site names some that are not."""
    tokens = _tokens_of_samples(site.source, site.nodes.batch_axis)
    if site.queries is None:
        return tokens
    known = bool((site.queries >= 0).all() and (site.queries < tokens.shape[1]).all())
    return tokens[:, site.queries] if known else None


def _is_each_once(placement: Placement, asking: Tensor, heads: int) -> bool:
    """Whether every token that queries does so in one place for every head, and no other token does."""
    asked = placement.queries >= 0
    head = placement.heads[:, None].expand_as(placement.queries)
    found = (placement.queries * heads + head)[asked]
    expected = asking.flatten()[:, None] * heads + torch.arange(heads)
    return torch.equal(found.sort().values, expected.flatten().sort().values)


def _tokens_of_samples(node: Node, batch_axis: int) -> Tensor:
    """``[samples, tokens]``: flat positions of the tokens of a value whose channels are last."""
    shape = shape_of(node)[:-1]
    return torch.arange(math.prod(shape)).view(shape).movedim(batch_axis, 0).flatten(1)


def _sample_of_each(tokens: Tensor) -> Tensor:
    """``[tokens of all samples]``: the sample of every flat position."""
    sample = torch.empty(tokens.numel(), dtype=torch.long)
    sample[tokens] = torch.arange(len(tokens))[:, None]
    return sample


def _within_sample(site: AttentionSite) -> Tensor:
    """``[tokens of all samples + 1]``: of every flat position the token within its sample; the last is that of -1."""
    tokens = _tokens_of_samples(site.source, site.nodes.batch_axis)
    token = torch.full((tokens.numel() + 1,), -1)
    token[tokens] = torch.arange(tokens.shape[1])
    return token


def _count(node: Node) -> int:
    return math.prod(shape_of(node)[:-1])


__all__ = ["heads_of_groups", "hidden_keys", "in_groups", "misplaced", "result_rows"]
