"""What a calibration is to do, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ..errors import ArgumentError, nearest

METHODS = ("lsq", "bias", "distill")
TOKEN_WEIGHTS = ("readout", "uniform")


@dataclass(frozen=True)
class Calibration:
    """Data and settings of a calibration, as ``calibrate`` and ``convert(calibrate=...)`` take them.

    Args:
        data: unlabeled images: a tensor ``[images, ...]``, an iterable of batches such as a DataLoader, or a
            callable without arguments that returns one. A batch is a tensor, a tuple that begins with it, or a dict of
            arguments.
        method: ``"lsq"`` refits output projections in closed form, ``"bias"`` corrects their means only, ``"distill"``
            trains all weights towards the original's logits.
        n: how many images to use, over all processes.
        ridge: pull towards the old weights, relative to the mean square of the features.
        holdout: share of the images that judge and are not fitted to.
        token_weights: ``"readout"`` weighs every token by how much the logits move with it, so that a class token
            counts; ``"uniform"`` weighs all alike.
        value_step: refit value projections too where that wins on the held-out images. None: with ``"lsq"``.
        seed: which images are held out.
        steps, lr: of ``"distill"``; None: 40 and 1e-3.
        resume: a file that the state is kept in, from which an interrupted run goes on to the same result.
        progress: show a progress bar on a terminal.
    """

    data: Any
    method: str = "lsq"
    n: int = 256
    ridge: float = 1e-2
    holdout: float = 0.25
    token_weights: str = "readout"
    value_step: bool | None = None
    seed: int = 0
    steps: int | None = None
    lr: float | None = None
    resume: str | PathLike[str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        _require_one_of("method", self.method, METHODS)
        _require_one_of("token_weights", self.token_weights, TOKEN_WEIGHTS)
        _require_whole("n", self.n, 2)
        _require_whole("seed", self.seed, 0)
        if not 0 < self.holdout < 1:
            raise ArgumentError(
                f"holdout: must be between 0 and 1 (the share of images to judge on), got {self.holdout!r}"
            )
        if not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ArgumentError(f"ridge: must be positive, got {self.ridge!r}; 1e-2 suits most models")
        if self.method != "lsq" and self.value_step:
            raise ArgumentError(f"value_step: requires method='lsq', got method={self.method!r}; leave it out")
        if self.method != "distill" and (self.steps is not None or self.lr is not None):
            raise ArgumentError(f"steps, lr: require method='distill', got method={self.method!r}; leave them out")
        if self.method == "distill":
            self._check_training()

    def _check_training(self) -> None:
        if self.steps is not None:
            _require_whole("steps", self.steps, 1)
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ArgumentError(f"lr: must be positive, got {self.lr!r}")

    def of_result(self) -> dict[str, Any]:
        """The settings that the result depends on, as plain data."""
        return {key: value for key, value in self.__dict__.items() if key not in ("data", "resume", "progress")}


def _require_one_of(argument: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(
            f"{argument}: expected one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}"
        )


def _require_whole(argument: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise ArgumentError(f"{argument}: expected a whole number of at least {least}, got {value!r}")
