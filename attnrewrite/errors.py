"""What can go wrong, one class per cause; every one of them is an ``AttnRewriteError``."""


import difflib
from collections.abc import Iterable


class AttnRewriteError(Exception):
    """Any error that this library raises on purpose."""


class ArgumentError(AttnRewriteError, ValueError):
    """Invalid argument, or combination of arguments, of a public call."""


class CaptureError(AttnRewriteError, RuntimeError):
    """The model could not be read as a graph."""


class ConversionError(AttnRewriteError, RuntimeError):
    """A site could not be rewritten as asked."""


class Refusal(AttnRewriteError):
    """A place in a model is left as it is: no site, or a site with no meaning in a target, or one that stays.

    It is told in plans and reports; no public call raises it.

    Args:
        reason: one clause, about the site ("its bias ...").
        remedy: what to do instead, in one clause; nothing where leaving the site out is all there is.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy

    def told(self, site: str) -> str:
        """What to tell the user of the site of this name: to leave it out, where nothing else helps."""
        remedy = self.remedy or f'leave it out with keep="{site}"'
        return f"{self.reason}; {remedy}"


class NothingToDo(Refusal):
    """A site is already what the target would make of it."""


class CalibrationError(AttnRewriteError, ValueError):
    """Calibration data, or a pair of models, that nothing can be learned from."""


class CheckpointError(AttnRewriteError, ValueError):
    """A file or mapping does not hold the weights that were expected."""


class BackendError(AttnRewriteError, RuntimeError):
    """No backend can run an operator as asked."""


class ConversionWarning(UserWarning):
    """Something is not as it was before a conversion, and would go unnoticed."""


UNFORESEEN = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip
"""What reading or rewriting an unknown spelling may raise. It makes the site refused, never the user's call fail."""


def unforeseen(cause: BaseException) -> str:
    """The reason to give for one of them."""
    return f"it could not be read ({type(cause).__name__}: {first_line(cause)})"


def first_line(cause: BaseException) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that looks most like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
