"""Make torchvision importable where its compiled operators do not fit the installed torch.

torchvision describes two of its compiled operators to torch at import time, whether or not its compiled
library could be loaded, so on such a machine ``import torchvision`` fails, and timm and transformers with it.
No attention model needs those operators: it is enough that torch knows their schemas. Calling one raises.
"""

import functools
import importlib
import importlib.util
import sys

import torch

from .errors import AttnRewriteError

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure_torchvision() -> None:
    """Import torchvision, after declaring its operators to torch if that is what it lacks."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_missing_operators()
        _forget_half_imported()
        _import_again()


def _declare_missing_operators() -> None:
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _fragment().define(schema)


@functools.cache
def _fragment() -> torch.library.Library:
    """The library that holds the declarations; they would vanish with it, so it is kept for good."""
    return torch.library.Library("torchvision", "FRAGMENT")


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _import_again() -> None:
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        raise AttnRewriteError(
            f"torchvision does not work with torch {torch.__version__} ({error}); "
            "install the torchvision release that matches it"
        ) from error
