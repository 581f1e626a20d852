"""Official checkpoints: out of their wrappers, checked against the model, then loaded."""

from __future__ import annotations

import argparse
import inspect
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArgumentError, CheckpointError, first_line
from .registry import FAMILIES, Family, State, create_model, family_of
from .vision_model import VisionModel

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Where official files keep their weights; an average of the weights goes before the last ones."""
PREFIXES = ("module.", "_orig_mod.")


def load_official(
    checkpoint: str | PathLike[str] | Mapping[str, Any], model: VisionModel | str | None = None, **options: Any
) -> VisionModel:
    """A model with the weights of an official checkpoint.

    Args:
        checkpoint: a file (safetensors, or one that ``torch.load`` reads with ``weights_only``), or what such a file
            holds. Wrappers (``model``, ``state_dict``, ``state_dict_ema``, …) and prefixes of parallel training are
            taken off, and old buffers that are recomputed are left out. Stored positions (T2T-ViT's) of another map
            than the model's are resampled.
        model: to load into, or a name to build; None finds the variant by its shapes.
        options: for building, over what the checkpoint tells (``num_classes``, the code generation, …).

    Raises:
        ArgumentError: options beside a model that is already built.
        CheckpointError: the file cannot be read, its weights are of no known family, of several, or of another
            model than was asked for; nothing is loaded then.
    """
    state = read_state(checkpoint)
    if isinstance(model, VisionModel):
        if options:
            raise ArgumentError(f"{next(iter(options))}: the model is already built; pass its name to build it")
        family = _family_of(model)
        return _load(model, family.prepare(state)[0], type(model).__name__)
    if model is not None:
        family = family_of(model)
        prepared, told = family.prepare(state)
        return _load(_build(model, {**_told(family, prepared, told), **options}), prepared, model)
    owner = _owner(state)
    prepared, told = owner.prepare(state)
    told = {**_told(owner, prepared, told), **options}
    return _load(_build(_variant(owner, prepared, told), told), prepared, "the checkpoint")


def read_state(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> State:
    """The weights by name, out of a file or mapping and its wrappers.

    Raises:
        CheckpointError: nothing in it is a mapping of names to tensors.
    """
    content: Any = checkpoint if isinstance(checkpoint, Mapping) else _read_file(Path(checkpoint))
    while isinstance(content, Mapping):
        wrapped = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapped is None:
            break
        content = content[wrapped]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(part, Tensor) for part in content.values())
    ):
        raise CheckpointError(
            f"the checkpoint contains no mapping of names to tensors, not even under {', '.join(WRAPPERS)}"
        )
    state = {str(name): tensor for name, tensor in content.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as cause:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely ({first_line(cause)}); "
            "save its weights alone, as safetensors or a state_dict"
        ) from cause


def _family_of(model: VisionModel) -> Family:
    for family in FAMILIES:
        if type(model) is family.model:
            return family
    raise ArgumentError(
        f"model: {type(model).__name__} is not one of this library's models; load its state_dict itself"
    )


def _owner(state: State) -> Family:
    owners = [family for family in FAMILIES if family.owns(state)]
    if len(owners) != 1:
        found = f"{len(owners)} families" if owners else "no family that is known here"
        raise CheckpointError(f"weights like {next(iter(state))!r} are of {found}; pass model= with the model's name")
    return owners[0]


def _told(family: Family, state: State, told: dict[str, Any]) -> dict[str, Any]:
    """What the weights tell about the constructor's options."""
    classifier = state.get("head.weight")
    return {"num_classes": 0 if classifier is None else len(classifier), **told}


def _variant(family: Family, state: State, options: dict[str, Any]) -> str:
    fitting = []
    for name in family.variants:
        with torch.device("meta"):
            model = _build(name, options)
        if _shapes(model.state_dict()) == _shapes(model.fit_state(state)):
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(fitting or family.variants)
    problem = "fits several models" if fitting else f"fits no variant of {family.model.__name__}"
    raise CheckpointError(f"the checkpoint {problem}; pass model= with one of: {known}")


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _build(name: str, options: dict[str, Any]) -> VisionModel:
    known = inspect.signature(family_of(name).model).parameters
    model = create_model(name, **{key: value for key, value in options.items() if key in known})
    assert isinstance(model, VisionModel)
    return model


def _load(model: VisionModel, state: State, expected: str) -> VisionModel:
    own, state = model.state_dict(), model.fit_state(state)
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"the checkpoint is not of {expected}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    return model
