"""The papers' whole models, under their official weight names.

>>> from attnrewrite.models import create_model, list_models, load_official
>>> list_models("transnext*")
>>> create_model("transnext_tiny", num_classes=10)
>>> load_official("checkpoint.pth")

Importing this package also registers them with timm, where timm is installed.
"""

from .checkpoint import load_official
from .in_timm import register_with_timm
from .registry import create_model, list_models
from .rmt import RMT
from .transnext import TransNeXt
from .vision_model import FeatureMaps, VisionModel

__all__ = ["RMT", "FeatureMaps", "TransNeXt", "VisionModel", "create_model", "list_models", "load_official"]

register_with_timm()
