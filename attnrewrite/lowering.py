"""Which backend runs the operators: choose one, list them, add one; and programs without any operator of ours."""

from .operators.backend import Backend, Deferred, Request
from .operators.dispatch import (
    autotune,
    available_backends,
    refusals,
    register_backend,
    select_backend,
    use_backend,
)
from .operators.operator import plain_decompositions

__all__ = [
    "Backend",
    "Deferred",
    "Request",
    "autotune",
    "available_backends",
    "plain_decompositions",
    "refusals",
    "register_backend",
    "select_backend",
    "use_backend",
]
