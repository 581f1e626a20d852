"""What can be recognised and what it can become: one file each. Importing a file registers it."""

from . import identity, mlp, neighborhood, patch_stem, softmax_attention

__all__ = ["identity", "mlp", "neighborhood", "patch_stem", "softmax_attention"]
