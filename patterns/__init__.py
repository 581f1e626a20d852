"""What can be recognised and what it can become: one file each. Importing a file registers it."""

from . import (
    aggregated,
    identity,
    long_short_distance,
    manhattan,
    mlp,
    neighborhood,
    patch_stem,
    softmax_attention,
)

__all__ = [
    "aggregated",
    "identity",
    "long_short_distance",
    "manhattan",
    "mlp",
    "neighborhood",
    "patch_stem",
    "softmax_attention",
]
