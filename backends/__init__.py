"""The ways to run an operator: one file or folder each, behind one registry.

This is the one place that knows the built-in backends by name.
"""

from ..operators.dispatch import register_backend
from .reference import REFERENCE
from .tiled import TILED

for _backend in (REFERENCE, TILED):
    register_backend(_backend)
