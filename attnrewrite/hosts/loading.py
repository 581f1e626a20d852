"""Load a model by the name its library knows it by, or from the user's own file.

Names: ``timm:vit_tiny_patch16_224``, ``torchvision:swin_t``, ``transformers:ViTForImageClassification`` (a model
class, built from its default configuration), ``path/to/file.py:Factory``, or a bare timm or torchvision name.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ArgumentError, nearest
from ..torchvision_compat import ensure_torchvision


def load_model(spec: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the model that ``spec`` names, with random weights unless ``pretrained``.

    The keyword arguments go to the library's factory, to the configuration of a transformers model, or to the
    factory in the user's file.
    """
    if in_file := re.fullmatch(r"(.+\.py):(\w+)", spec):
        return _from_file(Path(in_file[1]), in_file[2], pretrained, **kwargs)
    library, colon, name = spec.partition(":")
    if not colon:
        library, name = _library_of(spec), spec
    _require("library", library, _LOADERS)
    return _LOADERS[library](name, pretrained, **kwargs)


def _from_timm(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    timm = _import("timm")
    _require("timm model", _architecture(name), timm.list_models())
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def _from_torchvision(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    models = _import("torchvision").models
    _require("torchvision model", name, models.list_models(models))
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)


def _from_transformers(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    transformers = _import("transformers")
    _require("transformers model", name, dir(transformers))
    model_class = getattr(transformers, name)
    if getattr(model_class, "config_class", None) is None:
        raise ArgumentError(f"transformers.{name} is not a concrete model class")
    if pretrained:
        raise ArgumentError(f"a transformers class has no weights of its own; use {name}.from_pretrained")
    config_class = model_class.config_class
    default = config_class()
    for key in kwargs:  # a configuration accepts any name, and ignores the ones that it does not know
        if not hasattr(default, key) and not hasattr(default, f"_{key}"):
            raise _unknown(f"option of {config_class.__name__}", key, default.to_dict())
    return model_class(config_class(**kwargs))


_LOADERS: dict[str, Callable[..., nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


def _library_of(name: str) -> str:
    """The library that a bare ``name`` belongs to: timm where both know it."""
    known: dict[str, str] = {}
    if _is_installed("torchvision"):
        models = _import("torchvision").models
        known |= dict.fromkeys(models.list_models(models), "torchvision")
    if _is_installed("timm"):
        known |= dict.fromkeys(_import("timm").list_models(), "timm")
    if not known:
        raise _not_installed("a model library")
    _require("model", _architecture(name), known)
    return known[_architecture(name)]


def _architecture(name: str) -> str:
    """A timm name without the tag of its weights."""
    return name.partition(".")[0]


def _from_file(path: Path, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    module = _import_file(path)
    _require(f"factory in {path}", name, vars(module))
    factory = getattr(module, name)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ArgumentError(f"{name} in {path} is not a class or function that returns a model")
    if pretrained:
        kwargs["pretrained"] = True
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} in {path} returned {type(model).__name__}, not an nn.Module")
    return model


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ArgumentError(f"no such file: {path}")
    name = f"attnrewrite_user_{path.stem}"  # shadows nothing, whatever the file is called
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle looks for the classes of the model
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as for a script, so that the file can import its neighbors
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _import(library: str) -> ModuleType:
    if not _is_installed(library):
        raise _not_installed(library)
    ensure_torchvision()
    return importlib.import_module(library)


def _not_installed(library: str) -> ArgumentError:
    return ArgumentError(f"{library} is not installed: pip install 'attnrewrite[zoo]'")


def _require(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise _unknown(kind, name, known)


def _unknown(kind: str, name: str, known: Iterable[str]) -> ArgumentError:
    return ArgumentError(f"unknown {kind}, got {name!r}{nearest(name, known)}")
