"""What can be recognised and what it can become: one file each. Importing a file registers it."""

from . import (
    aggregated,
    conv_glu,
    cross_scale,
    identity,
    long_short_distance,
    manhattan,
    mlp,
    neighborhood,
    patch_stem,
    recipes,
    softmax_attention,
    tokens_to_token,
)

__all__ = [
    "aggregated",
    "conv_glu",
    "cross_scale",
    "identity",
    "long_short_distance",
    "manhattan",
    "mlp",
    "neighborhood",
    "patch_stem",
    "recipes",
    "softmax_attention",
    "tokens_to_token",
]
