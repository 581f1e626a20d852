"""``keep="auto"``: leave alone the sites whose conversion alone does the most harm, until a budget holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError, nearest
from ..planning.plan import Plan
from ..reports.conversion import ModelErrors
from ..reports.numbers import error_text
from .measure import images_for, measure_model, measure_sites

Budget = float | Mapping[str, float]


def checked_budget(budget: Budget | None) -> dict[str, float]:
    """A budget as limits by name: ``error`` at most, ``agreement`` at least.

    Raises:
        ArgumentError: it is neither a number nor such a mapping.
    """
    limits = {"error": budget} if isinstance(budget, int | float) else budget
    if not isinstance(limits, Mapping) or not limits:
        raise ArgumentError(
            f'budget: keep="auto" needs the largest relative error of the outputs, such as 0.1, or '
            f'{{"agreement": 0.95}}, got {budget!r}'
        )
    for name, limit in limits.items():
        if name not in ("error", "agreement"):
            raise ArgumentError(
                f"budget: must set error or agreement, got {name!r}{nearest(name, ['error', 'agreement'])}"
            )
        if (
            isinstance(limit, bool)
            or not isinstance(limit, int | float)
            or not limit >= 0
            or (name == "agreement" and limit > 1)
        ):
            raise ArgumentError(
                f"budget: {name} must be {'between 0 and 1' if name == 'agreement' else 'positive'}, got {limit!r}"
            )
    return dict(limits)


def require_budget(automatic: bool, budget: Budget | None) -> None:
    """Refuse a budget that nothing uses, or a missing or wrong one, before anything is computed."""
    if automatic:
        checked_budget(budget)
    elif budget is not None:
        raise ArgumentError('budget: requires keep="auto"; leave it out otherwise')


def keep_the_worst(plan: Plan, budget: Budget | None, data: Any | None) -> Plan:
    """The plan without the sites that have the largest error alone, as many as it takes to hold ``budget``.

    The model is measured as converted, before any calibration, on ``data`` or the example input. Sites of one module go
    together.
    """
    limits = checked_budget(budget)
    if not plan.converting:
        return plan
    images = images_for(plan, data)
    converted = plan.apply()
    alone = measure_sites(converted, plan.model, plan.places, images)
    order = sorted(alone, key=lambda name: -(alone[name].logits or 0.0))
    errors = measure_model(converted, plan.model, images)
    while plan.converting and not _within(errors, limits):
        owner = next(
            (o for name in order for o in plan.programs if name in {site.name for site in o.sites}), plan.programs[0]
        )
        moved = {id(site): alone[site.name].logits if site.name in alone else None for site in owner.sites}
        plan = plan.keeping(
            {
                site: f'keep="auto": its conversion alone moves the outputs by {error_text(error)}'
                for site, error in moved.items()
            }
        )
        if plan.converting:
            errors = measure_model(plan.apply(), plan.model, images)
    return plan


def _within(errors: ModelErrors, limits: dict[str, Any]) -> bool:
    if "agreement" in limits and errors.agreement is None:
        raise ArgumentError(
            "budget: agreement needs logits [images, classes], and the model returns something else; set an error "
            "instead"
        )
    return errors.logits <= limits.get("error", float("inf")) and (errors.agreement or 0.0) >= limits.get(
        "agreement", 0.0
    )
