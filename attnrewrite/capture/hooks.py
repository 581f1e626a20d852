"""A model's own hooks, for those who only look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def hooks_left_out(model: nn.Module) -> Iterator[None]:
    """No hook of ``model`` fires; all are there again on exit, in their order and with their handles."""
    names = [name for name in vars(nn.Module()) if "hook" in name and "forward" in name]
    held = [vars(module)[name] for module in model.modules() for name in names if vars(module).get(name)]
    contents = [dict(hooks) for hooks in held]
    for hooks in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in zip(held, contents, strict=True):
            hooks.update(content)
