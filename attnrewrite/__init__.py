"""Rewrite the attention of PyTorch vision models: recognised by meaning, certified, measured."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

# An install maps `patterns/` and `backends/` into this package. In a bare checkout they are its siblings,
# so the checkout itself joins the search path, before anything below looks for them.
_here = Path(__file__).resolve().parent
if not (_here / "patterns").exists() and (_here.parent / "patterns" / "__init__.py").exists():
    __path__.append(str(_here.parent))

from .calibration import Calibration, calibrate
from .convert import convert, report, revert
from .costs import analyze
from .errors import AttnRewriteError
from .explain import explain
from .planning import plan

__all__ = [
    "AttnRewriteError", "Calibration", "__version__", "analyze", "calibrate", "convert", "explain", "plan", "report",
    "revert",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """The papers' operators and models are imported when they are asked for."""
    if name in ("functional", "models", "modules"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
