"""Which backend runs the operators: choose one, list them, add one."""

from .operators.dispatch import (
    Backend,
    Deferred,
    Request,
    available_backends,
    refusals,
    register_backend,
    select_backend,
    use_backend,
)

__all__ = [
    "Backend",
    "Deferred",
    "Request",
    "available_backends",
    "refusals",
    "register_backend",
    "select_backend",
    "use_backend",
]
