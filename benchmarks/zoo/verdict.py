"""What becomes of one model: its conversion, the comparison with the original, the verdict."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attnrewrite
from zoo.case import Case
from zoo.enlivening import enliven

TOLERANCE = 2e-5
"""Greatest absolute error of an output relative to its greatest absolute value."""

GRADIENT_TOLERANCE = 2e-3
"""The same of a gradient, which float32 rounds at every step backward; beyond it, float64 decides."""

SECONDS_A_MODEL = 300
OTHER_BATCH = 3


@dataclass(frozen=True)
class Row:
    """What became of one model."""

    model: str
    sites: str
    verdict: str
    error: float | None
    seconds: float
    sizes: str = ""
    training: str = ""

    @property
    def is_defect(self) -> bool:
        return any("DEFECT" in part for part in (self.verdict, self.sizes, self.training))

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        cells = (self.model, self.sites, error, self.sizes, self.training, f"{self.seconds:.0f}", self.verdict)
        return f"| {' | '.join(cells)} |"


class TooSlow(BaseException):
    """A model took longer than ``SECONDS_A_MODEL``."""


def sweep(case: Case, batch: int) -> Row:
    """Convert one model and compare it with itself."""
    start = time.perf_counter()
    sites, error, sizes, training = "", None, "", ""
    try:
        with _time_limit(SECONDS_A_MODEL):
            torch.manual_seed(0)
            try:
                model = enliven(case.build()).eval()
            except Exception as cause:
                return Row(case.name, "", f"not built: {_line(cause)}", None, time.perf_counter() - start)
            try:
                converted = attnrewrite.convert(
                    model, to="identity", example_inputs=case.inputs(batch), fidelity="exact", progress=False
                )
            except attnrewrite.AttnRewriteError as refusal:
                return Row(case.name, "", f"refused: {_line(refusal)}", None, time.perf_counter() - start)
            sites, verdict = _sites(converted)
            error, broken = compare(model, converted, case, batch)
            verdict = broken or verdict
            sizes = at_other_sizes(model, converted, case)
            training = in_training(model, converted, case)
    except TooSlow:
        verdict = f"no verdict within {SECONDS_A_MODEL} s"
    except Exception as foreign:
        verdict = f"DEFECT: {type(foreign).__name__}: {_line(foreign)}"
    return Row(case.name, sites, verdict, error, time.perf_counter() - start, sizes, training)


def at_other_sizes(model: nn.Module, converted: nn.Module, case: Case) -> str:
    """What came at other sides of the image, at batches of 1 and 3: equal, raised by the library, or a defect."""
    found: Counter[str] = Counter()
    for sides in case.other_sides:
        for batch in (1, OTHER_BATCH):
            inputs = case.inputs(batch, sides)
            expected = outputs(copy.deepcopy(model), inputs)  # some remember the size that they saw last
            if expected is not None:
                found[judged(copy.deepcopy(converted), inputs, expected, f"{sides[0]}x{sides[1]}, batch {batch}")] += 1
    return ", ".join(f"{count} {what}" for what, count in found.items()) or "takes none"


def judged(converted: nn.Module, inputs: Tensor, expected: list[Tensor], where: str) -> str:
    try:
        actual = run(converted, inputs)
    except attnrewrite.AttnRewriteError:
        return "refused"
    except Exception as foreign:
        return f"DEFECT ({where}: {type(foreign).__name__}: {_line(foreign)})"
    if [value.shape for value in actual] != [value.shape for value in expected]:
        return f"DEFECT ({where}: other shapes)"
    error = max(map(relative_error, actual, expected), default=0.0)
    return "equal" if error <= 10 * TOLERANCE else f"DEFECT ({where}: wrong by {error:.1e})"


def in_training(model: nn.Module, converted: nn.Module, case: Case) -> str:
    """The gradient of the inputs in training mode, with the same draws; what draws by element is not compared."""
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        return "draws"
    inputs = case.inputs(OTHER_BATCH)
    try:
        expected = gradient(copy.deepcopy(model), inputs)
    except Exception:
        return "does not train"
    try:
        actual = gradient(copy.deepcopy(converted), inputs)
    except attnrewrite.AttnRewriteError:
        return "refused"
    except Exception as foreign:
        return f"DEFECT ({type(foreign).__name__}: {_line(foreign)})"
    error = relative_error(actual, expected)
    if not error <= GRADIENT_TOLERANCE:  # rounding turns a ReLU, and with it a gradient
        precise = (gradient(copy.deepcopy(each).double(), inputs.double()) for each in (converted, model))
        error = relative_error(*precise)
    return "equal" if error <= GRADIENT_TOLERANCE else f"DEFECT (wrong by {error:.1e})"


def gradient(model: nn.Module, inputs: Tensor) -> Tensor:
    torch.manual_seed(0)
    inputs = inputs.clone().requires_grad_()
    outputs = _tensors(model.train()(inputs))
    loss = sum((value * torch.arange(1, value.shape[-1] + 1)).square().sum() for value in outputs)
    (found,) = torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]  # there are outputs
    return found


def compare(model: nn.Module, converted: nn.Module, case: Case, batch: int) -> tuple[float | None, str]:
    """The worst relative error, and what is wrong (an empty string: nothing)."""
    errors: list[float] = []
    for size in (batch, OTHER_BATCH):
        inputs = case.inputs(size)
        expected = outputs(model, inputs)
        if expected is None:  # the original takes no other batch: there is nothing to compare with
            continue
        try:
            actual = run(converted, inputs)
        except Exception as foreign:
            return None, f"DEFECT: at a batch of {size}: {type(foreign).__name__}: {_line(foreign)}"
        if [value.shape for value in actual] != [value.shape for value in expected]:
            return None, f"DEFECT: at a batch of {size} the outputs have other shapes"
        errors += [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    error = max(errors, default=math.nan)
    if error <= TOLERANCE:
        return error, ""
    exact, rounding = in_double(model, converted, case.inputs(OTHER_BATCH))
    if exact <= 1e-9:
        return error, f"equal in float64 ({exact:.0e}); float32 rounds the original's own output by {rounding:.1e}"
    return error, f"DEFECT: wrong by {error:.1e} ({exact:.1e} in float64)"


def in_double(model: nn.Module, converted: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """The relative error in float64, and that of the original's own float32 output."""
    twins = [copy.deepcopy(each).double() for each in (model, converted)]
    single = outputs(model, inputs)
    expected, actual = (outputs(twin, inputs.double()) for twin in twins)
    if single is None or expected is None or actual is None:
        return math.inf, math.nan
    exact = max(map(relative_error, actual, expected))
    return exact, max(relative_error(s.double(), e) for s, e in zip(single, expected, strict=True))


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor] | None:
    """What the model computes, or None where it does not run."""
    try:
        return run(model, inputs)
    except Exception:
        return None


def run(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What the model computes; a random one draws the same numbers every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return _tensors(model(inputs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Greatest absolute error relative to the greatest absolute value; infinite where either is not finite."""
    if not bool(expected.isfinite().all() & actual.isfinite().all()):
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _sites(converted: nn.Module) -> tuple[str, str]:
    """Sites by kind and status, and the verdict that they amount to."""
    rows = attnrewrite.report(converted).sites
    counts = Counter((row.kind, row.status) for row in rows)
    sites = ", ".join(f"{count} {kind} {status}" for (kind, status), count in sorted(counts.items()))
    reasons = Counter(row.why for row in rows if row.status == "refused")
    listed = "; ".join(f"{count}× {_line(reason)}" for reason, count in reasons.items())
    return sites, f"equal; refused: {listed}" if listed else "equal"


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _line(reason: object) -> str:
    text = " ".join(str(reason).split()).replace("|", "/")
    text = re.sub(r"(?:[A-Za-z]:)?(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
