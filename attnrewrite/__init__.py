"""Rewrite the attention of PyTorch vision models: recognized by meaning, certified, measured."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# An install maps `patterns/` and `backends/` into this package. In a bare checkout they are its siblings,
# so the checkout itself joins the search path, before anything below looks for them.
_here = Path(__file__).resolve().parent
if not (_here / "patterns").exists() and (_here.parent / "patterns" / "__init__.py").exists():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from .api.conversion import convert, plan, record, replay, report, revert
    from .api.explanation import explain
    from .api.lowering_report import explain_lowering
    from .calibration import Calibration, calibrate
    from .costs import analyze
    from .errors import AttnRewriteError
    from .planning.record import Record
    from .version import __version__

__all__ = [
    "AttnRewriteError", "Calibration", "Record", "__version__", "analyze", "calibrate", "convert", "explain",
    "explain_lowering", "plan",
    "record", "replay", "report", "revert",
]  # fmt: skip

_PLACES = {
    "__version__": "version",
    "AttnRewriteError": "errors",
    "Calibration": "calibration",
    "Record": "planning.record",
    "analyze": "costs",
    "calibrate": "calibration",
    "convert": "api.conversion",
    "explain": "api.explanation",
    "explain_lowering": "api.lowering_report",
    "plan": "api.conversion",
    "record": "api.conversion",
    "replay": "api.conversion",
    "report": "api.conversion",
    "revert": "api.conversion",
}
_ROOMS = ("errors", "functional", "lowering", "models", "modules")


def __getattr__(name: str) -> Any:
    """Everything is imported when it is asked for: importing the package costs little more than importing torch."""
    if name in _PLACES:
        value = globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
        return value
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_ROOMS})
