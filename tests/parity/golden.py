"""Golden files: what an official implementation computed, read and compared with ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Golden:
    """One file: its metadata and tensors, the floating ones in float64."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    stored: dict[str, torch.dtype]

    @staticmethod
    def read(path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            metadata, raw = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, no dict
        tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in raw.items()}
        return Golden(path, metadata, tensors, {name: tensor.dtype for name, tensor in raw.items()})

    @property
    def family(self) -> str:
        return self.metadata["family"]

    @property
    def official_class(self) -> str:
        return self.metadata["class"]

    @property
    def constructor(self) -> dict[str, Any]:
        return json.loads(self.metadata["ctor"])

    @property
    def call(self) -> dict[str, Any]:
        return json.loads(self.metadata["call"])

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def inputs(self) -> dict[str, Tensor]:
        known = ("input", "q", "k", "v", "rpb", "add_k", "add_v")
        return {name: value for name, value in self.tensors.items() if name.split("/")[0] in known}


@dataclass
class Subject:
    """Our counterpart of an official module.

    Attributes:
        module: built from the constructor arguments, not yet loaded; its dtype is set by the comparison.
        run: the file's inputs by name to results by their names in the file (``output``, ``feature/…``, ``extra/…``).
        rename: an official parameter's name to ours; None for a buffer that ours does not hold.
        float32_tolerances: for gradients whose name ends so, instead of the usual one.
    """

    module: nn.Module
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    rename: Callable[[str], str | None] = field(default=lambda name: name)
    float32_tolerances: dict[str, float] = field(default_factory=dict)


def counterpart(golden: Golden, builders: dict[str, Any]) -> Any:
    """What builds our counterpart of the official class.

    Raises:
        LookupError: nothing does.
    """
    if golden.official_class not in builders:
        raise LookupError(f"no counterpart for {golden.official_class}")
    return builders[golden.official_class]


def require_understood(golden: Golden, options: dict[str, Any]) -> None:
    """Raises:
    LookupError: official arguments are left over.
    """
    if options:
        raise LookupError(f"{golden.official_class}: no counterpart for {', '.join(options)}")


@dataclass(frozen=True)
class Deviation:
    """Largest absolute difference, relative to the largest expected magnitude or 1."""

    name: str
    value: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.value <= self.tolerance  # also false for NaN


def compare(golden: Golden, subject: Subject, dtype: torch.dtype) -> list[Deviation]:
    """Every result and gradient that the file stores, computed in ``dtype``."""
    module = subject.module.to(dtype).eval()
    load(golden, subject)
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in golden.inputs().items()}
    results = subject.run(inputs)
    outputs = {name for name in golden.tensors if name.split("/")[0] == "output"}
    assert outputs <= set(results), f"{golden.path.name}: {outputs - set(results)} not computed"
    deviations = [
        _deviation(golden, name, result, 1e-10 if dtype == torch.float64 else 1e-5)
        for name, result in results.items()
        if name in golden.tensors
    ]
    loss = [(results[name] * golden.tensors["g" + name.removeprefix("output")].to(dtype)).sum() for name in outputs
            if "g" + name.removeprefix("output") in golden.tensors]  # fmt: skip
    if loss:
        torch.stack(loss).sum().backward()
        deviations += _gradients(golden, subject, inputs, dict(module.named_parameters()), dtype)
    return deviations


def load(golden: Golden, subject: Subject) -> None:
    state = {subject.rename(name): tensor for name, tensor in golden.under("param/").items()}
    state.pop(None, None)
    subject.module.load_state_dict(state, strict=True)


def _gradients(
    golden: Golden,
    subject: Subject,
    inputs: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype,
) -> list[Deviation]:
    def gradient(name: str) -> Tensor:
        holder = inputs[name] if name in inputs else parameters[str(subject.rename(name))]
        return torch.zeros_like(holder) if holder.grad is None else holder.grad

    def tolerance(name: str) -> float:
        if dtype == torch.float64:
            return 1e-10
        return next((value for end, value in subject.float32_tolerances.items() if name.endswith(end)), 1e-4)

    deviations = [_deviation(golden, f"grad/{name}", gradient(name), tolerance(name)) for name in golden.under("grad/")]
    for name in golden.under("gradslice/"):
        sliced = gradient(name)[..., ::4, ::4]
        deviations.append(_deviation(golden, f"gradslice/{name}", sliced, 1e-10 if dtype == torch.float64 else 1e-4))
    if "gradstat" in golden.tensors and dtype == torch.float64:
        for name, row in zip(json.loads(golden.metadata["gradstat_names"]), golden.tensors["gradstat"], strict=True):
            found = gradient(name)
            holder = parameters[str(subject.rename(name))].detach()
            statistics = torch.stack([found.sum(), found.norm(), (found * holder).sum()])
            value = ((statistics - row).abs() / row.abs().clamp_min(1)).max().item()
            deviations.append(Deviation(f"gradstat/{name}", value, 1e-9))
    return deviations


def _deviation(golden: Golden, name: str, found: Tensor, tolerance: float) -> Deviation:
    expected = golden.tensors[name]
    if golden.stored[name] != torch.float64:
        tolerance = max(tolerance, 1e-6)  # the stored value is rounded
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    value = (found.detach().double() - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    return Deviation(name, value, tolerance)
