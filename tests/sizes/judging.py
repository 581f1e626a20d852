"""Whether a converted model is its donor at other sizes, batches and modes, or says that it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten

import attnrewrite
from attnrewrite.errors import CaptureError, ConversionError, first_line

TARGETS = {"identity": {}, "neighborhood": {"fidelity": "exact"}}
"""What keeps a model's function, and how it is asked for."""

FAULTS = ("WRONG", "FOREIGN", "HARMED")


@dataclass(frozen=True)
class Finding:
    """What came of one target at one place."""

    target: str
    where: str
    verdict: str
    detail: str = ""

    def __str__(self):
        return f"{self.target}, {self.where}: {self.verdict} {self.detail}"


def images(batch, size, channels=3):
    generator = torch.Generator().manual_seed(1000 * batch + 37 * size[0] + size[1])
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=generator)


def outputs(model, batch, gradient=False):
    """All tensors that come out, and the gradient of the batch; chance starts anew every time."""
    torch.manual_seed(0)
    if not gradient:
        with torch.no_grad():
            return tree_flatten(_logits(model(batch)))
    batch = batch.clone().requires_grad_()
    leaves, structure = tree_flatten(_logits(model(batch)))
    loss = sum((leaf * torch.arange(1, leaf.shape[-1] + 1)).square().sum() for leaf in leaves)
    given = torch.autograd.grad(loss, batch, allow_unused=True)[0]
    return [*(leaf.detach() for leaf in leaves), torch.zeros_like(batch) if given is None else given], structure


def _logits(output):
    return getattr(output, "logits", output)


def error(actual, expected):
    """The largest difference of all tensors, each relative to its largest value; infinite where shapes differ."""
    (ours, structure), (theirs, expected_structure) = actual, expected
    if structure != expected_structure or [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if torch.equal(torch.isfinite(one), torch.isfinite(other)):
            one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
            worst = max(worst, float((one - other).abs().max()) / max(float(other.abs().max()), 1e-300))
        else:
            worst = float("inf")
    return worst


def compare(converted, donor, batch, train=False, gradient=False, tolerance=1e-9):
    """The verdict on one batch, and a detail: equal, refused, WRONG, FOREIGN, or that the donor itself fails."""
    try:
        expected = outputs(donor.train(train), batch, gradient)
    except Exception as cause:
        return "donor fails", f"{type(cause).__name__}: {first_line(cause)}"
    try:
        actual = outputs(converted.train(train), batch, gradient)
    except ConversionError as refusal:
        return "refused", first_line(refusal)
    except Exception as cause:
        return "FOREIGN", f"{type(cause).__name__}: {first_line(cause)}"
    found = error(actual, expected)
    return ("equal", "") if found < tolerance else ("WRONG", f"by {found:.1e}")


def places(captured, others):
    """(name, batch, mode) of all that is judged; after training in eval again, for statistics kept meanwhile."""
    for batch in (1, 3):
        yield f"captured size, batch {batch}", images(batch, captured), False
    for i, size in enumerate(others):
        yield f"{size[0]}x{size[1]}, batch {3 - 2 * (i % 2)}", images(3 - 2 * (i % 2), size), False
    yield "captured size, training", images(3, captured), True
    for size in others[1:3]:
        yield f"{size[0]}x{size[1]}, training", images(2, size), True
    yield "captured size after training", images(2, captured), False


def judge(make, captured, others, targets=TARGETS):
    """All findings on the model that ``make`` gives, converted at one size to each target with its options."""
    return [one for to, options in targets.items() for one in judge_target(make, captured, others, to, **options)]


def judge_target(make, captured, others, target, **options):
    given, donor = make(), make()
    verdict, detail = compare(donor, make(), images(1, captured))
    if verdict != "equal":
        return [Finding(target, "donor", "donor fails", detail)]
    try:
        converted = attnrewrite.convert(given, target, images(1, captured), progress=False, **options)
    except (ConversionError, CaptureError) as refusal:
        return [Finding(target, "conversion", "refused", first_line(refusal))]
    except Exception as cause:
        return [Finding(target, "conversion", "FOREIGN", f"{type(cause).__name__}: {first_line(cause)}")]
    kinds = sorted({site.kind for site in attnrewrite.report(converted).converted})
    findings = [Finding(target, "conversion", "converted", ", ".join(kinds))]
    in_step = True
    for where, batch, train in places(captured, others):
        if not in_step and not train and where.endswith("after training"):
            continue  # one went on where the other stopped: its statistics are others now
        findings.append(Finding(target, where, *compare(converted, donor, batch, train, gradient=train)))
        in_step &= not train or findings[-1].verdict not in ("refused", "donor fails")
    if compare(given, make(), images(2, captured))[0] in FAULTS:
        findings.append(Finding(target, "the donor after conversion", "HARMED"))
    return findings


def faults(findings):
    return [finding for finding in findings if finding.verdict in FAULTS]


def told(subject, found):
    """The message of a failing test."""
    return "\n  ".join([f"{subject}", *map(str, found)])


def fate(findings):
    """One word on all of a model's findings: the worst."""
    verdicts = {finding.verdict for finding in findings}
    return next(worst for worst in (*FAULTS, "refused", "equal", "donor fails") if worst in verdicts)
