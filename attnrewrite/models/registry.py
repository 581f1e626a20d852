"""The whole models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError, nearest
from .vision_model import FeatureMaps, VisionModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Models of one class, and what is particular to their official checkpoints.

    Attributes:
        model: the class; its constructor takes ``num_classes`` and ``in_chans``, everything by keyword.
        variants: constructor options by model name.
        owns: whether official weights, by their names, are of this family.
        prepare: official weights to the state of this library's model, without buffers that it recomputes, and the
            constructor options that the weights themselves tell (a code generation, say).
    """

    model: type[VisionModel]
    variants: Mapping[str, Mapping[str, Any]]
    owns: Callable[[State], bool]
    prepare: Callable[[State], tuple[State, dict[str, Any]]]


FAMILIES: list[Family] = []


def register_family(family: Family) -> None:
    FAMILIES.append(family)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the whole models that match a glob, sorted."""
    return sorted(name for family in FAMILIES for name in family.variants if fnmatchcase(name, pattern))


def family_of(name: str) -> Family:
    """Raises:
    ArgumentError: for an unknown name, with the nearest known ones.
    """
    for family in FAMILIES:
        if name in family.variants:
            return family
    raise ArgumentError(f"name: unknown model, got {name!r}{nearest(name, list_models())}; list_models() lists all")


def create_model(
    name: str, *, features_only: bool = False, out_indices: Sequence[int] | None = None, **options: Any
) -> nn.Module:
    """Build a model with random weights.

    Args:
        name: one of ``list_models()``.
        features_only: return a module that gives the feature maps, finest first, instead of logits.
        out_indices: with ``features_only``, which levels.
        options: over the variant's own (``num_classes``, ``in_chans``, ``drop_path_rate``, …).

    Raises:
        ArgumentError: for an unknown name or option, or options that do not fit each other.
    """
    family = family_of(name)
    known = inspect.signature(family.model).parameters
    for option in options:
        if option not in known:
            raise ArgumentError(
                f"{option}: {name} has no such option{nearest(option, known)}; it accepts: {', '.join(known)}"
            )
    if out_indices is not None and not features_only:
        raise ArgumentError("out_indices: requires features_only=True; set it, or leave them out")
    if features_only:
        options["num_classes"] = 0
    model = family.model(**{**family.variants[name], **options})
    return FeatureMaps(model, out_indices) if features_only else model
