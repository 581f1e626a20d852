"""The loaded binary, or the reason why there is none."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

from ...errors import first_line
from . import build

REMEDY = "build them with `python -m attnrewrite build`"


@cache
def missing() -> str | None:
    """Why there are no kernels here, or None once they are loaded; a warning says so the first time."""
    path = build.find()
    if path is None:
        reason = f"its kernels are not built; {build.obstacle() or REMEDY}"
        warnings.warn(f"backend 'native' is left out, and slower ones serve: {reason}", stacklevel=2)
        return reason
    try:
        torch.ops.load_library(str(path))
    except OSError as cause:
        return f"its kernels could not be loaded ({first_line(cause)}); delete {path} and {REMEDY}"
    return None


def kernels() -> Any:
    """The operators of ``csrc/registration.cpp``, where ``missing()`` is None."""
    return torch.ops.attnrewrite_native
