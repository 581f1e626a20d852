"""``reduced_keys="refit"``: keys and values of tokens against an independent solve, what is dropped, what it gains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_definitions import Operands
from attnrewrite.patterns import pixel_keys
from attnrewrite.patterns.targets.manhattan import Manhattan
from conversions import Case, case_marks, case_name, converted, copied, learned
from mixed_donors import operands_of
from target_donors import attention_rows, distance, donor, images, logits, new_parameters
from torch import Tensor

import attnrewrite
from attnrewrite.errors import ConversionError

REFIT = {"reduced_keys": "refit"}
CASE: Case = ("pvt v2", "neighborhood", {"kernel_size": 3} | REFIT)
CASES = [
    CASE,
    ("pvt v2, linear", "manhattan", REFIT),
    ("pvt v1, twins", "long_short_distance", REFIT),
]
EVERY = pytest.mark.parametrize("case", [pytest.param(c, marks=case_marks(c), id=case_name(c)) for c in CASES])


def solved(op: Operands, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias from the tokens to the reduced key or value of the cell each lies in, by augmented rows."""
    assert op.reduced is not None
    assert op.tokens is not None
    (height, width), (rows, columns) = op.sides, op.reduced
    reduced = getattr(op, name).flatten(2)
    cell = [y * rows // height * columns + x * columns // width for y in range(height) for x in range(width)]
    x, y = op.tokens.flatten(0, 1), reduced[:, cell].flatten(0, 1)
    centered, wanted = x - x.mean(0), y - y.mean(0)
    damping = (1e-3 * centered.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    augmented = torch.cat([centered, damping]), torch.cat([wanted, torch.zeros(x.shape[1], y.shape[1])])
    slope = torch.linalg.lstsq(*augmented, driver="gelsd").solution
    return slope.T, y.mean(0) - x.mean(0) @ slope


def worst_difference(case: Case, new: list[dict[str, Tensor]]) -> float:
    """Of the new projections of all reduced sites from the independent solve."""
    found = []
    for op in operands_of(donor(case[0]), images(case[0])):
        for name in ("key", "value") if op.reduced is not None else ():
            for part, expected in zip(("weight", "bias"), solved(op, name), strict=True):
                found.append(distance(new[op.index][f"{name}.{part}"], expected))
    assert len(found) >= 12
    return max(found)


@EVERY
def test_new_projections_are_those_of_an_independent_solve(case: Case) -> None:
    assert worst_difference(case, learned(converted(case), case[0])) <= 1e-8


def test_a_wrong_cell_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    upsampled = pixel_keys._upsampled
    monkeypatch.setattr(pixel_keys, "_upsampled", lambda *arguments: upsampled(*arguments).roll(1, 1))
    model = attnrewrite.convert(donor(CASE[0]), CASE[1], images(CASE[0]), **CASE[2])
    found = new_parameters(model, donor(CASE[0]))
    names = [name for name in found if name.endswith("key.weight")]
    first = next(op for op in operands_of(donor(CASE[0]), images(CASE[0])) if op.reduced is not None)
    assert distance(found[names[0]].detach(), solved(first, "key")[0]) > 1e-3


@EVERY
def test_what_is_dropped_is_gone_and_counted(case: Case) -> None:
    """The reducer, its norm and the old projections of keys and values."""
    model, old = converted(case), donor(case[0])
    gone = set(old.state_dict()) - set(model.state_dict())
    for row in attention_rows(model)[:3]:
        own = {name for name in gone if name.startswith(f"{row.name}.")}
        assert {name.removeprefix(f"{row.name}.").partition(".")[0] for name in own} == {"kv", "sr", "norm"}
        counts = {name: value.numel() for name, value in old.state_dict().items()}
        assert row.parameters["dropped"] == sum(counts[name] for name in own)
        assert row.exactness == "PROJECTED"
        assert "fitted to the reduced ones" in row.why
        assert 0 < row.settings["key_r2"] <= 1
        kept = [f"{row.name}.{part}.{kind}" for part in ("q", "proj") for kind in ("weight", "bias")]
        assert row.parameters["moved"] == sum(counts[name] for name in kept)
        added = [p.numel() for n, p in new_parameters(model, old).items() if n.startswith(f"{row.name}.")]
        assert row.parameters["new"] == sum(added)


@EVERY
def test_every_parameter_that_is_left_trains(case: Case) -> None:
    model = copied(case).train()
    (model(images(case[0], 2, seed=9)) * torch.arange(1, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    new = new_parameters(model, donor(case[0]))
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in new.values())


class Carried(Manhattan):
    """The projections of the reduced keys, as they were."""

    def fit(self, conversion: Any, *rest: Any) -> Any:
        return conversion


def test_the_fit_is_worth_it_on_other_images() -> None:
    name, batch = "pvt v2", images("pvt v2", 6, seed=21)
    fitted = attnrewrite.convert(donor(name), "manhattan", images(name, 4), **REFIT)
    carried = attnrewrite.convert(donor(name), Carried(**REFIT), images(name, 4))
    expected = logits(donor(name), batch)
    assert [row.exactness for row in attention_rows(carried)] == ["PROJECTED"] * 3 + ["CONTINUOUS"]
    assert distance(logits(fitted, batch), expected) < distance(logits(carried, batch), expected)


def test_it_is_below_what_keeps_the_function() -> None:
    plan = attnrewrite.plan(donor("pvt v2"), "manhattan", images("pvt v2"), fidelity="continuous", **REFIT)
    statuses = [planned.status for planned in plan.sites if planned.site.kind == "attention"]
    assert statuses == ["kept"] * 3 + ["convert"]


def test_the_default_is_refused_and_names_both_options() -> None:
    with pytest.raises(ConversionError, match=r"reduced_keys='keep' .* reduced_keys='refit' .* to='aggregated'"):
        attnrewrite.convert(donor("pvt v2"), "manhattan", images("pvt v2"), strict=True)


def test_recovery_from_images_takes_such_sites() -> None:
    name = "pvt v2"
    model = attnrewrite.calibrate(
        copy.deepcopy(converted(CASE)), donor(name), images(name, 12, seed=31), n=12, progress=False
    )
    report = attnrewrite.report(model).calibration
    assert report.after.logits <= report.before.logits
    assert any("attn" in site for site in report.sites)
