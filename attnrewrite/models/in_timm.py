"""The whole models in timm's registry, so that ``timm.create_model`` builds them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ArgumentError
from ..torchvision_compat import ensure_torchvision
from .registry import create_model, list_models

__all__: list[str] = []  # timm adds the names that it registers


def register_with_timm() -> None:
    """Does nothing where timm is not installed, or knows a model of that name itself."""
    if importlib.util.find_spec("timm") is None:
        return
    ensure_torchvision()
    from timm.models import is_model, register_model

    for name in list_models():
        if not is_model(name):
            register_model(_entry(name))


def _entry(name: str) -> Callable[..., nn.Module]:
    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise ArgumentError(
                f"pretrained: no weights of {name} are hosted; load a file with attnrewrite.models.load_official"
            )
        return create_model(name, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    setattr(sys.modules[__name__], name, entry)
    return entry
