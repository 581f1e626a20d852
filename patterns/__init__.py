"""What can be recognised and what it can become: one file each. Importing a file registers it."""

from . import identity, neighborhood, softmax_attention

__all__ = ["identity", "neighborhood", "softmax_attention"]
