"""The papers' whole models, under their official weight names.

>>> from attnrewrite.models import create_model, list_models, load_official
>>> list_models("transnext*")
>>> create_model("transnext_tiny", num_classes=10)
>>> load_official("checkpoint.pth")

Importing this package also registers them with timm, where timm is installed.
"""

from .checkpoint import load_official
from .crossformer import CrossFormer
from .in_timm import register_with_timm
from .nat import NAT, DiNATS
from .nat_isotropic import IsotropicNAT
from .registry import create_model, list_models
from .rmt import RMT
from .t2t_vit import T2TViT
from .transnext import TransNeXt
from .vision_model import FeatureMaps, VisionModel

__all__ = [
    "NAT",
    "RMT",
    "CrossFormer",
    "DiNATS",
    "FeatureMaps",
    "IsotropicNAT",
    "T2TViT",
    "TransNeXt",
    "VisionModel",
    "create_model",
    "list_models",
    "load_official",
]

register_with_timm()
