"""A backend: one way to run operators, and what it is asked before it is chosen.

To write one, make a ``Backend`` object in a module below ``attnrewrite.backends``, or in a package of your own that
names it as an entry point (see ``dispatch``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, first_line
from .problem import Problem, TensorSpec


@dataclass(frozen=True)
class Request:
    """What is to be run: everything a backend may need to accept it and to model its cost.

    Attributes:
        problem: the call, of ``TensorSpec`` in the place of tensors.
        backward: whether it is the operator's backward that is to run.
        needs_gradient: whether the backward will have to run after it.
        deterministic: whether ``torch.use_deterministic_algorithms`` asks for the same bits every time.
        capability: of the device; the instruction set of a CPU, ``"9.0"`` and the like of a GPU.
    """

    problem: Problem
    backward: bool = False
    needs_gradient: bool = False
    deterministic: bool = False
    capability: str = ""

    @classmethod
    def of(cls, problem: Problem, backward: bool = False, needs_gradient: bool = False) -> Request:
        """Of a call with tensors."""
        first = problem.operands[0]
        assert first is not None
        deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(problem.specs(), backward, needs_gradient, deterministic, _capability(first.device))

    @property
    def operator(self) -> str:
        """The name that implementations have."""
        return f"{self.problem.name}_backward" if self.backward else self.problem.name

    @property
    def device(self) -> str:
        """Type of the device that the operands are on."""
        return self._first.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def _first(self) -> TensorSpec:
        first: Any = self.problem.operands[0]
        return first


Implementation = Callable[..., tuple[Tensor | None, ...]]
"""Forward: of a problem, to its results. Backward: of a problem, its results, the gradients that arrive at them (None
where none does), and which operands' gradients are wanted, to a gradient for every operand (None for others)."""


class Deferred(Mapping[str, Implementation]):
    """Functions of ``module``, by their names; it is imported when the first of them is taken. ``|`` joins those of
    several modules.

    So a backend can be listed, asked and costed on machines that cannot import what it runs on.
    """

    def __init__(self, module: str, *names: str) -> None:
        self.modules = dict.fromkeys(names, module)

    def __or__(self, other: Deferred) -> Deferred:
        joined = Deferred("")
        joined.modules = self.modules | other.modules
        return joined

    def __getitem__(self, name: str) -> Implementation:
        """
        Raises:
            BackendError: the module cannot be imported.
        """
        module = self.modules[name]
        try:
            function: Implementation = getattr(import_module(module), name)
        except (ImportError, OSError) as cause:
            raise BackendError(
                f"{module} could not be imported ({type(cause).__name__}: {first_line(cause)}); "
                "choose another backend with attnrewrite.lowering.use_backend"
            ) from cause
        return function

    def __contains__(self, name: object) -> bool:  # a mapping's own takes the value, and so would import
        return name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def _supports_all(request: Request) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run operators.

    Attributes:
        implementations: an ``Implementation`` by an operator's name ("local_attention", "local_attention_backward").
        supports: returns None, or the reason why not.
        cost: models the run time in seconds; only its comparison with other backends counts.
        requires: packages that must be importable. The module that makes the object must import without them;
            ``Deferred`` implementations, or imports inside functions, wait for the first run.
        devices: the device types that it runs on; none: any.
        is_plain: it runs an operator's plain form, which autograd may record instead.
        version: of the implementations, where measured times of an older one say nothing.
    """

    name: str
    implementations: Mapping[str, Implementation]
    cost: Callable[[Request], float]
    supports: Callable[[Request], str | None] = _supports_all
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    is_plain: bool = False
    version: str = ""

    def refusal(self, request: Request) -> str | None:
        """Why this backend cannot run the request, or None."""
        if missing := [package for package in self.requires if not _is_importable(package)]:
            return f"it requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        if self.devices and request.device not in (*self.devices, "meta"):  # where nothing is run
            return f"it runs on {' and '.join(self.devices)}, and the operands are on {request.device}"
        if request.operator not in self.implementations:
            return f"it does not implement {request.operator}"
        if request.needs_gradient and f"{request.operator}_backward" not in self.implementations:
            return f"it has no backward of {request.operator}"
        return self.supports(request)


@cache
def _capability(device: torch.device) -> str:
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return ""


@cache
def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # of a package above it; a stand-in in sys.modules has no spec
        return False
