"""Regions of a forward that turn autocast off: where it is off already they change nothing, and are traced in place."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode
from torch.overrides import _get_current_function_mode_stack

Interval = tuple[int, int]
"""Trace positions, half open."""


def idle_regions() -> list[Interval]:
    """Where they are, in the trace that is being made from now on: an exporter would make a graph of its own of each.

    A region tells the trace of itself through the mode that this thread traces by; that mode is not told of idle ones.
    """
    found: list[Interval] = []
    entered: list[tuple[str, int | None]] = []  # a device, and where a region is idle its start
    mode: Any = next(m for m in _get_current_function_mode_stack() if isinstance(m, PreDispatchTorchFunctionMode))
    told, nodes = mode.__torch_function__, mode.tracer.graph.nodes

    def told_unless_idle(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _enter_autocast:
            device, _, enabled, _ = args
            idle = not enabled and (device, None) not in entered
            entered.append((device, len(nodes) if idle else None))
            if idle:
                return None
        elif func is _exit_autocast:
            _, start = entered.pop()
            if start is not None:
                found.append((start, len(nodes)))
                return None
        return told(func, types, args, kwargs)

    mode.__torch_function__ = MethodType(told_unless_idle, mode)
    return found
