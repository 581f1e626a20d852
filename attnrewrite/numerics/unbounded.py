"""NaN and infinity in JSON, which has no such numbers: they are words there."""

from __future__ import annotations

import math
from typing import Any

UNBOUNDED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def spelled_out(value: Any) -> Any:
    """``value`` with the words of ``UNBOUNDED`` for these numbers, everywhere in its lists and dictionaries."""
    if isinstance(value, dict):
        return {key: spelled_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelled_out(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
