"""The common face of the whole models, after timm's conventions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ArgumentError


class VisionModel(nn.Module, ABC):
    """Image ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``.

    A family implements ``forward_features``, ``pool`` and ``feature_maps``, and sets the attributes below before the
    first call of ``reset_classifier``.

    Args:
        num_classes: width of the logits; 0 returns the pooled features.
        in_chans: channels of the image.
        global_pool: the family's ``default_pool``, or ``""`` to leave the features unpooled.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Raises:
        ArgumentError: for arguments of any family that do not fit each other.

    Attributes:
        num_classes: width of the logits; 0 means none, and the pooled features are returned.
        num_features: channels of ``forward_features``.
        head_hidden_size: channels of the pooled features, which the classifier reads.
        feature_info: one entry per level of ``feature_maps``: ``num_chs``, ``reduction`` (pixels per side), ``module``.
        default_pool: how this family pools, ``"avg"`` or ``"token"``.
    """

    default_pool: ClassVar[str] = "avg"
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    global_pool: str
    head: nn.Module

    @abstractmethod
    def forward_features(self, image: Tensor) -> Tensor:
        """The last normalized features, in the family's own layout."""

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """``[B, head_hidden_size]`` of what ``forward_features`` gives."""

    @abstractmethod
    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """One map ``[B, channels, H / reduction, W / reduction]`` a level."""

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official weights with what depends on the image's size brought to this model's; the rest as it is.

        Raises:
            CheckpointError: they do not tell for which size they are.
        """
        return state

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features; with ``pre_logits`` what the classifier would read."""
        pooled = self.pool(features) if self.global_pool else features
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, randomly initialized classifier.

        Args:
            num_classes: 0 removes it.
            global_pool: the family's own kind, or ``""`` to leave the features unpooled; None keeps what was.

        Raises:
            ArgumentError: for a negative width, another kind of pooling, or a classifier without pooling.
        """
        pool = getattr(self, "global_pool", self.default_pool) if global_pool is None else global_pool
        if num_classes < 0:
            raise ArgumentError(f"num_classes: must not be negative, got {num_classes}")
        if pool not in (self.default_pool, ""):
            raise ArgumentError(
                f"global_pool: {type(self).__name__} pools by {self.default_pool!r} or '', got {pool!r}"
            )
        if num_classes and not pool:
            raise ArgumentError("global_pool: a classifier needs pooled features; pass num_classes=0 with ''")
        self.num_classes, self.global_pool = num_classes, pool
        reference = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=reference.device, dtype=reference.dtype)
            if not reference.is_meta:
                nn.init.trunc_normal_(self.head.weight, std=0.02)
                nn.init.zeros_(self.head.bias)


class FeatureMaps(nn.Module):
    """A model that returns its feature maps (timm's ``features_only``).

    Args:
        model: without a classifier.
        out_indices: the levels to return, negative ones counted from the last; None is all.

    Raises:
        ArgumentError: if there is no such level.
    """

    def __init__(self, model: VisionModel, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        levels = len(model.feature_info)
        self.out_indices = tuple(range(levels) if out_indices is None else out_indices)
        for index in self.out_indices:
            if not -levels <= index < levels:
                raise ArgumentError(f"out_indices: there are {levels} levels, got {index}")
        self.model = model
        self.feature_info = [model.feature_info[index] for index in self.out_indices]

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.model.feature_maps(image)
        return [maps[index] for index in self.out_indices]
