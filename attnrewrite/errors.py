"""What can go wrong, one class a cause; every one of them is an `AttnRewriteError`."""


class AttnRewriteError(Exception):
    """Any error that this library raises on purpose."""


class ArgumentError(AttnRewriteError, ValueError):
    """An argument of a public call has no meaning here."""


class CaptureError(AttnRewriteError, RuntimeError):
    """The model could not be read as a graph."""


class ConversionError(AttnRewriteError, RuntimeError):
    """A site could not be rewritten as asked."""


class BackendError(AttnRewriteError, RuntimeError):
    """No backend can run an operator as asked."""
