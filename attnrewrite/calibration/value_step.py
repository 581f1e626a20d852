"""Refit the value projection in front of an output projection too, in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..numerics.ridge import ridge
from ..planning.places import Place, ValueHeads
from .images import Batch
from .least_squares import Pair, Refit, features, parameters_of, projection_parameters, solved
from .moments import Moments
from .parallel import agreed, summed
from .streams import calling

VALUE_STEPS = (1.0, 0.5, 0.25, 0.125)
"""Lengths tried along the value step: heads are solved each for itself, and together may go too far."""


def refit_value(pair: Pair, place: Place, strength: float) -> Refit | None:
    """A step of the value projection with the output projection refitted on top; None where there is no such step.

    Per head: ``min |e - G dv^T p^T|`` with ``G`` the sources as this head mixes them and ``p`` the head's columns of
    the output projection. Of the step's lengths the one with the smallest error after the refit is taken.
    """
    heads = place.value
    if heads is None:
        return None
    (weight, bias), scale = pair.projection(place), pair.scale(place)
    width = weight.shape[1]
    direction = _value_direction(pair, place, heads, strength)
    agreed(direction)
    held, fit = (_step_moments(pair, place, heads, direction, half) for half in (pair.images.held, pair.images.fit))
    old = torch.zeros(width + 1, len(weight), dtype=torch.float64, device=scale.device)
    old[:-1] = weight.double().T * scale
    lengths = []
    for length in VALUE_STEPS:
        moved = _moved(fit, old, length, width)
        change = solved(moved, bias is not None, strength)
        lengths.append((moved.error(change), length, change))
    _, length, change = min(lengths, key=lambda entry: entry[0])
    agreed(change)
    judged = _moved(held, old, length, width)
    new = projection_parameters(pair, place, change)
    new |= _value_parameters(pair.model, heads, length * direction)
    return Refit("value and projection", new, held.error(), judged.error(change))


def _value_direction(pair: Pair, place: Place, heads: ValueHeads, strength: float) -> Tensor:
    """The change ``[heads, source channels + 1, head_dim]`` of every head's values, each head solved for itself.

    What the output projection can explain alone is taken off the errors first.
    """
    (output, bias), scale = pair.projection(place), pair.scale(place)
    columns = torch.tensor(heads.columns, device=scale.device)
    plain = Moments(output.shape[1] + 1, len(output), scale.device)
    mixed: list[Moments] = []
    overlap: list[Tensor] = []
    for batch, x, error, weights in pair.rows(place, pair.images.fit):
        plain.add(x, error, weights)
        for head, g in enumerate(_mixed_sources(pair.model, place, heads, batch)):
            if head == len(mixed):
                mixed.append(Moments(g.shape[1], len(output), scale.device))
                overlap.append(g.new_zeros(g.shape[1], x.shape[1]))
            mixed[head].add(g, error, weights)
            overlap[head] += (g * weights[:, None]).T @ x
    plain.reduce()
    summed(*overlap)
    change = solved(plain, bias is not None, strength)
    weight = output.double().T * scale + change[:-1]
    steps = []
    for moments, shared, column in zip(mixed, overlap, columns, strict=True):
        moments.reduce()
        head_weight = weight[column]
        left = ridge(moments.gram, moments.cross - shared @ change, strength) @ head_weight.T
        steps.append(left @ torch.linalg.pinv(head_weight @ head_weight.T, hermitian=True))
    direction = torch.stack(steps)
    if heads.bias is None:
        direction[:, -1] = 0
    return direction


def _mixed_sources(model: nn.Module, place: Place, heads: ValueHeads, batch: Batch) -> Iterator[Tensor]:
    """Per head the rows ``[rows, source channels + 1]`` that its values are a linear map of.

    The projection's input is linear in the values, whatever the operator: its coefficients are read off by giving the
    value projection weights that pass a few source channels on at a time.
    """
    projection = place.projection
    assert projection is not None
    weight, bias = parameters_of(model, heads)
    rows, columns = (torch.tensor(part, device=weight.device) for part in (heads.rows, heads.columns))
    again = calling(model, batch, heads.owner, projection.input)
    silent = weight.index_fill(0, rows.flatten(), 0)
    parts = []

    def mixed(given: Tensor, constant: float) -> Tensor:
        """The projection's input where the values are made by the weight ``given`` and a bias of ``constant``."""
        probe = {heads.weight: given}
        if heads.bias is not None and bias is not None:
            probe[heads.bias] = bias.index_fill(0, rows.flatten(), constant)
        return projection.rows(again(probe))

    for channels in torch.arange(weight.shape[1], device=rows.device).split(rows.shape[1]):
        passing = silent.clone()
        passing[rows[:, : len(channels)], channels] = 1
        parts.append(mixed(passing, 0)[..., columns[:, : len(channels)]])
    of_one = torch.zeros_like(parts[-1][..., :1]) if bias is None else mixed(silent, 1)[..., columns[:, :1]]
    yield from torch.cat([*parts, of_one], dim=-1).flatten(0, 1).double().unbind(1)


def _step_moments(pair: Pair, place: Place, heads: ValueHeads, direction: Tensor, chosen: Tensor) -> Moments:
    """Moments of the projection's input before the step, its change by the whole step, and a one."""
    assert place.projection is not None
    output, _ = pair.projection(place)
    moments = Moments(2 * output.shape[1] + 1, len(output), direction.device)
    moved = _value_parameters(pair.model, heads, direction)
    for batch, x, error, weights in pair.rows(place, chosen):
        again = calling(pair.model, batch, heads.owner, place.projection.input)
        stepped = features(place.projection.rows(again(moved)))
        moments.add(torch.cat([x[:, :-1], (stepped - x)[:, :-1], x[:, -1:]], dim=1), error, weights)
    moments.reduce()
    return moments


def _moved(moments: Moments, old: Tensor, length: float, width: int) -> Moments:
    """Moments after a step of ``length``: features ``x + length * dx``, errors less what ``old`` makes of the step."""
    eye = torch.eye(width, dtype=torch.float64, device=old.device)
    basis = torch.zeros(2 * width + 1, width + 1, dtype=torch.float64, device=old.device)
    basis[:width, :width], basis[width:-1, :width], basis[-1, -1] = eye, length * eye, 1
    effect = torch.zeros(2 * width + 1, old.shape[1], dtype=torch.float64, device=old.device)
    effect[width:-1] = length * old[:-1]
    after = moments.transformed(basis)
    after.cross = basis.T @ (moments.cross - moments.gram @ effect)
    after.square = torch.tensor(moments.error(effect), dtype=torch.float64, device=old.device)
    return after


def _value_parameters(model: nn.Module, heads: ValueHeads, change: Tensor) -> dict[str, Tensor]:
    """New weight and bias of the value projection; ``change`` is ``[heads, source channels + 1, head_dim]``."""
    old_weight, old_bias = parameters_of(model, heads)
    rows = torch.tensor(heads.rows, device=old_weight.device)
    weight = old_weight.clone()
    weight[rows] += change[:, :-1].transpose(1, 2).to(weight)
    new = {heads.weight: weight}
    if old_bias is not None:
        assert heads.bias is not None
        bias = old_bias.clone()
        bias[rows] += change[:, -1].to(bias)
        new[heads.bias] = bias
    return new
