"""The site IR: what was recognized, as plain data. One line of text a site.

Vocabulary: a *site* is one attention, MLP or stem; a *projection* says which weight row feeds which head and dimension;
*keys* says which tokens a query sees; *bias* what is added to the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..capture import ModuleCall
from .keys import Global, Grid, Interleaved, KeySet, MapGroups, Reduced, Tokens, Window, pair_text


@dataclass(frozen=True)
class Projection:
    """A linear map by weight rows: ``rows[head, dim]`` is the row (for an output projection: column) of ``weight``."""

    weight: Node
    bias: Node | None
    rows: Tensor

    @property
    def heads(self) -> int:
        return self.rows.shape[0]

    @property
    def head_dim(self) -> int:
        return self.rows.shape[1]


@dataclass(frozen=True)
class Bias:
    """What is added to the scores: a ``table`` by relative index, an ``mlp`` on coordinates, a ``dense`` matrix.

    ``nodes`` are the graph values that are added (they stay live and trainable); ``values`` is their sum at capture,
    ``[heads or 1, queries, keys]`` of one group, float64. ``constant`` is the part that no parameter reaches.
    """

    kind: str
    nodes: tuple[Node, ...]
    values: Tensor = field(repr=False)
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({'x'.join(map(str, self.shape))})"


@dataclass(frozen=True)
class HeadNorm:
    """What divides every head vector of queries or keys by its length, between projection and product.

    ``kind``, ``place`` and ``eps`` are those of ``cores.head_norm.normalize_heads``; ``weight`` and ``bias`` are graph
    values of ``head_dim`` elements (they stay live and trainable). It takes ``source`` to ``node``, of one shape;
    ``vectors`` ``[n, head_dim]`` are flat positions of some head vectors in both.
    """

    kind: str
    place: str
    eps: float
    source: Node
    node: Node
    vectors: Tensor = field(repr=False)
    weight: Node | None = None
    bias: Node | None = None


@dataclass(frozen=True)
class Operand:
    """A tensor of the attention product and its axes: group axes, then ``x`` query, ``y`` key, ``d``/``e`` dim."""

    node: Node
    axes: str


@dataclass(frozen=True)
class Placement:
    """What lies where in the operands of a product, whose group axes are flattened in the order of ``groups``.

    ``heads[group]`` is a group's head; ``queries[group, place]`` and ``keys[group, place]`` are the tokens, by their
    flat positions among those of ``source`` and ``key_source`` (-1: a padded slot).
    """

    heads: Tensor
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class AttentionProduct:
    """``product`` consumes query and key, ``output`` is the product with the values, and ``groups`` are the operands'
    batch-like axes."""

    query: Operand
    key: Operand
    value: Operand
    output: Operand
    product: Node
    groups: str


@dataclass(frozen=True)
class AttentionNodes(AttentionProduct):
    """Where a site lies in the captured graph.

    ``head_groups`` are the ``groups`` that run over heads. ``source`` and ``key_source`` feed the projections;
    ``out_proj`` is the output projection and ``linears`` are the others; ``result`` is the first value after it whose
    tokens lie as those of ``source``. ``batch_axis`` is the axis of ``source`` that counts samples; ``placement`` is
    known where the projections are. ``weights`` are the attention weights, where the graph shows them.
    """

    head_groups: str
    source: Node | None = None
    key_source: Node | None = None
    out_proj: Node | None = None
    result: Node | None = None
    batch_axis: int = 0
    linears: tuple[Node, ...] = ()
    placement: Placement | None = field(default=None, repr=False)
    weights: Operand | None = None

    @property
    def batch_groups(self) -> str:
        return "".join(axis for axis in self.groups if axis not in self.head_groups)


@dataclass(frozen=True)
class AttentionSite:
    """One softmax attention.

    ``scale`` multiplies the product of projected query and key; ``learned_scales`` are graph values that multiply it
    too, one number per head; ``scale_of_operands`` is what is left of ``scale`` after what acts on the operands before
    their product. ``qk`` names what else acts on queries and keys between projection and product; ``query_norm`` and
    ``key_norm`` say it where it is known. ``queries`` are the tokens of a sample of ``source`` that query, None for all
    of them: a class token alone reads the others out and mixes none. ``place`` is the cell of the map that every token
    of a sample lies at, where a site on a map is given its tokens in another order than the map's, such as group by
    group.
    """

    name: str
    owner: ModuleCall
    heads: int
    head_dim: int
    keys: KeySet
    nodes: AttentionNodes
    scale: float
    grid: Grid | None = None
    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None
    output: Projection | None = None
    bias: Bias | None = None
    mask: Tensor | None = field(default=None, repr=False)
    learned_scales: tuple[Node, ...] = ()
    qk: str = "none"
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    dropout: float = 0.0
    scale_of_operands: float = 1.0
    queries: Tensor | None = field(default=None, repr=False)
    place: Tensor | None = field(default=None, repr=False)
    kind = "attention"

    @property
    def source(self) -> Node:
        """What the query projection acts on, of a site whose projections are known."""
        assert self.nodes.source is not None
        return self.nodes.source

    @property
    def result(self) -> Node:
        """The value behind the output projection, of a site that has one."""
        assert self.nodes.result is not None
        return self.nodes.result

    @property
    def map_grid(self) -> Grid:
        """The grid of a site that is known to have one, as windows do."""
        assert self.grid is not None
        return self.grid

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Extents of the axes that run over heads, in one sample."""
        nodes = self.nodes
        extents = dict(zip(nodes.output.axes, nodes.output.node.meta["val"].shape, strict=True))
        inner = tuple(extents[axis] for axis in nodes.head_groups[1:])  # without batch axis the first holds samples too
        return (self.heads // math.prod(inner), *inner)

    @property
    def source_tokens(self) -> int:
        """Tokens of a sample of ``source``."""
        shape = self.source.meta["val"].shape
        return int(shape[:-1].numel()) // int(shape[self.nodes.batch_axis])

    def weights(self) -> list[Node]:
        """Weights and biases of its projections."""
        parts = [part for part in (self.query, self.key, self.value, self.output) if part is not None]
        return [node for part in parts for node in (part.weight, part.bias) if node is not None]

    def describe(self) -> str:
        grid = f" grid {self.grid}" if self.grid else ""
        bias = f" bias {self.bias}" if self.bias else ""
        mask = " mask" if self.mask is not None else ""
        qk = "" if self.qk == "none" else f" qk {self.qk}"
        queries = "" if self.queries is None else f" queries {len(self.queries)} of {self.source_tokens}"
        scale = " scale learned" if self.learned_scales else ""
        return f"attention{grid} heads {self.heads}x{self.head_dim}{queries} keys {self.keys}{bias}{mask}{qk}{scale}"


@dataclass(frozen=True)
class Stage:
    """One step between the two linear maps of an MLP, from graph value ``before`` to ``node``.

    ``kind`` is ``activation``, ``gate`` (activation times ``rows`` of another linear map ``gate``), ``convolution``
    (depthwise, on ``grid``; with ``added``, the sum of ``before`` and that convolution of it) or ``norm``; ``name`` is
    the activation.
    """

    kind: str
    node: Node
    before: Node
    name: str = ""
    gate: Node | None = None
    gate_value: Node | None = None
    rows: Tensor | None = field(default=None, repr=False)
    grid: tuple[int, int] = (0, 0)
    added: Node | None = None

    @property
    def call(self) -> Node:
        """The convolution or norm itself."""
        return self.node if self.added is None else self.added

    def __str__(self) -> str:
        convolution = "depthwise" if self.added is None else "depthwise residual"
        return {"activation": self.name, "gate": f"{self.name} gate", "convolution": convolution, "norm": "norm"}[
            self.kind
        ]


@dataclass(frozen=True)
class MlpSite:
    """``second(stages(first(source)))``: two linear maps with activation, gate, depthwise convolution between.

    ``rows`` are the rows of ``first``'s weight that the stages start from. ``result`` is ``second``'s value; ``grid``
    the map that the tokens lie on.
    """

    name: str
    owner: ModuleCall
    width: int
    hidden_width: int
    source: Node
    first: Node
    rows: Tensor = field(repr=False)
    stages: tuple[Stage, ...]
    second: Node
    grid: Grid | None = None
    kind = "mlp"

    @property
    def result(self) -> Node:
        return self.second

    def weights(self) -> list[Node]:
        """Weights and biases of its linear maps and convolutions."""
        gates = [stage.gate for stage in self.stages if stage.gate is not None]
        inner = [stage.call for stage in self.stages if stage.kind in ("convolution", "norm")]
        used = (n for node in (self.first, self.second, *gates, *inner) for n in node.args[1:3])
        return [node for node in used if isinstance(node, Node)]

    def describe(self) -> str:
        return f"mlp {self.width}->{self.hidden_width} {', '.join(map(str, self.stages))}"


@dataclass(frozen=True)
class StemSite:
    """Patches to tokens: a strided convolution, or (``patches``) a gather of patches with a linear map.

    ``patches[..., place]`` are the tokens of one patch in channel order, -1 for padding. ``tokens`` is the value in
    which the projected patches lie as tokens, if that is not ``result`` itself. ``grid`` is the map that patches are
    gathered from.
    """

    name: str
    owner: ModuleCall
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    source: Node
    result: Node
    weight: Node
    bias: Node | None
    tokens: Node | None = None
    patches: Tensor | None = field(default=None, repr=False)
    norm_node: Node | None = None
    grid: Grid | None = None
    kind = "stem"

    def weights(self) -> list[Node]:
        return [node for node in (self.weight, self.bias) if node is not None]

    def describe(self) -> str:
        form = "stem" if self.patches is None else "merge"
        padding = f" pad {pair_text(self.padding)}" if any(self.padding) else ""
        norm = " norm" if self.norm_node is not None else ""
        sizes = f"kernel {pair_text(self.kernel)} stride {pair_text(self.stride)}"
        return f"{form} {self.in_channels}->{self.out_channels} {sizes}{padding}{norm}"


Site = AttentionSite | MlpSite | StemSite


@dataclass(frozen=True)
class Refused:
    """A place that looked like a site and was left alone, with the reason."""

    name: str
    kind: str
    reason: str


def line(index: int, site: Site, certificate: Any = None) -> str:
    """The IR's text: ``%3 = attention ... @ blocks.0.attn   certified 2e-07``."""
    proof = f"   {certificate}" if certificate is not None else ""
    return f"%{index} = {site.describe()} @ {site.name or '(root)'}{proof}"


__all__ = [
    "AttentionNodes", "AttentionSite", "Bias", "Global", "Grid", "HeadNorm", "Interleaved", "KeySet", "MapGroups",
    "MlpSite", "Operand", "Placement", "Projection", "Reduced", "Refused", "Site", "Stage", "StemSite", "Tokens",
    "Window", "line",
]  # fmt: skip
