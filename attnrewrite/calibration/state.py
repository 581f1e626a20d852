"""The state of a calibration in one file, written whole or not at all, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CalibrationError
from .parallel import processes


@dataclass
class State:
    """What was done so far: a record a place or a stretch of training, and the tensors that go on from there.

    ``fingerprint`` says what the run depends on; a file of another run is not continued.
    """

    path: Path | None
    fingerprint: dict[str, str]
    done: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def load(self) -> None:
        """Continue from the file, if there is one.

        Raises:
            CalibrationError: the file cannot be read, or is of other data, weights or settings.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as stored:
                record = json.loads((stored.metadata() or {})["attnrewrite"])
                parameters = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a file, no dict
        except (SafetensorError, KeyError, ValueError, OSError) as cause:
            raise CalibrationError(
                f"resume: {self.path} is not a calibration state; delete it to start over"
            ) from cause
        changed = [name for name, value in self.fingerprint.items() if record["fingerprint"].get(name) != value]
        if changed:
            raise CalibrationError(
                f"resume: {self.path} is from a run with different {', '.join(changed)}; delete it to start over"
            )
        self.done, self.parameters = record["done"], parameters

    def save(self, record: dict[str, Any], parameters: dict[str, Tensor]) -> None:
        """Note what is finished; the first process writes the file. Without a path nothing is kept on disk."""
        self.done.append(record)
        self.parameters |= {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        if self.path is None or processes()[0] != 0:
            return
        text = json.dumps({"fingerprint": self.fingerprint, "done": self.done})
        beside = self.path.with_name(self.path.name + ".part")
        save_file(self.parameters, beside, metadata={"attnrewrite": text})
        os.replace(beside, self.path)


def fingerprint_of(model: nn.Module) -> str:
    """Changes with any weight."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
