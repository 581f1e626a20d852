"""Refit one place in closed form: its output projection, and the value projection in front of it.

The converted model's stream after the place shall be the original's: with ``x`` the projection's input and ``e`` the
difference of the two streams, ``e - x d`` is to be small, so that earlier errors are repaired too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..ridge import ridge
from .images import Batch, Images
from .moments import Moments
from .parallel import agreed, summed
from .places import Place, ValueHeads
from .streams import Tap, calling, read, tokens

VALUE_STEPS = (1.0, 0.5, 0.25, 0.125)
"""Lengths tried along the value step: heads are solved each for itself, and together may go too far."""


@dataclass
class Refit:
    """New values of parameters, by name, and the weighted squared stream error on held-out images before and after.

    ``strength`` is the ridge's, of refits that have one.
    """

    what: str
    parameters: dict[str, Tensor]
    before: float
    after: float
    strength: float = 0.0

    @property
    def wins(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        return f"{self.what}, ridge {self.strength:g}" if self.strength else self.what


@dataclass
class Pair:
    """The model that is calibrated and the one it was made from, on the same images."""

    model: nn.Module
    original: nn.Module
    images: Images
    weights: dict[str, Tensor]

    def token_weights(self, place: Place, stream: Tensor) -> Tensor:
        """Weights of the rows of ``stream`` ``[images, tokens, channels]``; those of a place without any are one."""
        count, length = stream.shape[:2]
        weights = self.weights.get(place.name, stream.new_ones(length))
        return weights.to(stream.device).repeat(count)

    def rows(self, place: Place, chosen: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Batch by batch: projection inputs, stream errors (float64, ``[rows, ...]``) and weights of the rows."""
        assert place.after is not None
        for batch in self.images.batches(chosen):
            x, after = read(self.model, batch, [Tap(place.projection), place.after])
            (wanted,) = read(self.original, batch, [place.after])
            error = tokens(wanted).double() - tokens(after).double()
            yield batch, features(x), error.flatten(0, 1), self.token_weights(place, error)

    def scale(self, place: Place) -> Tensor:
        linear = self.linear(place)
        if place.scale is None:
            return torch.ones(linear.out_features, dtype=torch.float64, device=linear.weight.device)
        return self.model.get_parameter(place.scale).detach().double().flatten()

    def linear(self, place: Place) -> nn.Linear:
        found = self.model.get_submodule(place.projection)
        assert isinstance(found, nn.Linear)
        return found

    def check(self, place: Place) -> None:
        """See on a few images that ``after = before + scale * projection(x)`` with tokens in the same order.

        Raises:
            CalibrationError: it is not so; the message is the reason.
        """
        assert place.after is not None
        batch = {name: value[:2] for name, value in next(self.images.batches()).items()}
        taps = [Tap(place.projection), place.after] + ([place.before] if place.before else [])
        linear = self.linear(place)
        with torch.no_grad():
            x, after, *before = read(self.model, batch, taps)
            branch = tokens(linear(x)) * self.scale(place).to(x.dtype)
        if tokens(x).shape[:2] != tokens(after).shape[:2]:
            raise CalibrationError("its projection does not see the tokens as the residual stream has them")
        expected = branch + (tokens(before[0]) if before else 0)
        tolerance = 1e-4 if after.dtype in (torch.float32, torch.float64) else 5e-2
        if not float((expected - tokens(after)).norm()) <= tolerance * float(tokens(after).norm()):
            raise CalibrationError("the stream after it is not the stream before it plus its projection")


def features(x: Tensor) -> Tensor:
    """Rows of ``x`` in float64 with a one at the end, for the projection's bias."""
    rows = tokens(x).flatten(0, 1).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def correct_bias(pair: Pair, place: Place) -> Refit:
    """The output projection's bias moved by the mean error."""
    linear = pair.linear(place)
    if linear.bias is None:
        raise CalibrationError("its output projection has no bias")
    fit, held = (_moments(pair, place, half) for half in (pair.images.fit, pair.images.held))
    change = torch.zeros_like(fit.cross)
    change[-1] = fit.cross[-1] / fit.gram[-1, -1]
    agreed(change)
    new = _projection_parameters(place, linear, change, pair.scale(place))
    return Refit("bias", new, held.error(), held.error(change))


def refit_projection(pair: Pair, place: Place, strengths: tuple[float, ...]) -> Refit:
    """Ridge regression of the output projection towards its old weights, by the strength that wins on held-out images."""
    linear = pair.linear(place)
    fit, held = (_moments(pair, place, half) for half in (pair.images.fit, pair.images.held))
    error, strength, change = _best_solution(fit, held, linear, strengths)
    new = _projection_parameters(place, linear, change, pair.scale(place))
    return Refit("projection", new, held.error(), error, strength)


def refit_value(pair: Pair, place: Place, strength: float, strengths: tuple[float, ...]) -> Refit | None:
    """A step of the value projection with the output projection refitted on top; None where there is no such step.

    Per head: ``min |e - G dv^T p^T|`` with ``G`` the sources as this head mixes them and ``p`` the head's columns of
    the output projection, by ridge regression of ``strength``. Of the step's lengths the one with the smallest error
    after the refit is taken.
    """
    heads = place.value
    if heads is None:
        return None
    linear, scale = pair.linear(place), pair.scale(place)
    direction = _value_direction(pair, place, heads, strength)
    agreed(direction)
    held, fit = (_step_moments(pair, place, heads, direction, half) for half in (pair.images.held, pair.images.fit))
    old = torch.zeros(linear.in_features + 1, linear.out_features, dtype=torch.float64, device=scale.device)
    old[:-1] = linear.weight.detach().double().T * scale
    found = []
    for length in VALUE_STEPS:
        moved, judged = (_moved(moments, old, length, linear.in_features) for moments in (fit, held))
        found.append((*_best_solution(moved, judged, linear, strengths), length))
    error, strength, change, length = min(found, key=lambda entry: entry[0])
    new = _projection_parameters(place, linear, change, scale)
    new |= _value_parameters(pair.model, heads, length * direction)
    return Refit("value and projection", new, held.error(), error, strength)


def _best_solution(
    fit: Moments, held: Moments, linear: nn.Linear, strengths: tuple[float, ...]
) -> tuple[float, float, Tensor]:
    """The smallest error on held-out images, with the ridge's strength and the change that reach it."""
    found = []
    for strength in strengths:
        change = _solve(fit, linear, strength)
        agreed(change)
        found.append((held.error(change), strength, change))
    return min(found, key=lambda entry: entry[0])


def install(model: nn.Module, refit: Refit) -> dict[str, Tensor]:
    """Write the new values into the model; returns the old ones."""
    old = {name: model.get_parameter(name).detach().clone() for name in refit.parameters}
    write(model, refit.parameters)
    return old


def write(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)


def _moments(pair: Pair, place: Place, chosen: Tensor) -> Moments:
    linear = pair.linear(place)
    moments = Moments(linear.in_features + 1, linear.out_features, linear.weight.device)
    for _, x, error, weights in pair.rows(place, chosen):
        moments.add(x, error, weights)
    moments.reduce()
    return moments


def _solve(moments: Moments, linear: nn.Linear, strength: float) -> Tensor:
    """The ridge solution, with no change of a bias that the projection does not have."""
    used = linear.in_features + (linear.bias is not None)
    change = torch.zeros_like(moments.cross)
    change[:used] = ridge(moments.gram[:used, :used], moments.cross[:used], strength)
    return change


def _projection_parameters(place: Place, linear: nn.Linear, change: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """New weight and bias from a change in units of the stream; a channel that the layer scale closes stays."""
    unscaled = torch.where(scale == 0, 0.0, change / torch.where(scale == 0, 1.0, scale))
    new = {f"{place.projection}.weight": linear.weight.detach() + unscaled[:-1].T.to(linear.weight)}
    if linear.bias is not None:
        new[f"{place.projection}.bias"] = linear.bias.detach() + unscaled[-1].to(linear.bias)
    return new


def _value_direction(pair: Pair, place: Place, heads: ValueHeads, strength: float) -> Tensor:
    """The change ``[heads, source channels + 1, head_dim]`` of every head's values, each head solved for itself.

    What the output projection can explain alone is taken off the errors first.
    """
    linear, scale = pair.linear(place), pair.scale(place)
    columns = torch.tensor(heads.columns, device=scale.device)
    plain = Moments(linear.in_features + 1, linear.out_features, scale.device)
    mixed: list[Moments] = []
    overlap: list[Tensor] = []
    for batch, x, error, weights in pair.rows(place, pair.images.fit):
        plain.add(x, error, weights)
        for head, g in enumerate(_mixed_sources(pair.model, place, heads, batch)):
            if head == len(mixed):
                mixed.append(Moments(g.shape[1], linear.out_features, scale.device))
                overlap.append(g.new_zeros(g.shape[1], x.shape[1]))
            mixed[head].add(g, error, weights)
            overlap[head] += (g * weights[:, None]).T @ x
    plain.reduce()
    summed(*overlap)
    change = _solve(plain, linear, strength)
    weight = linear.weight.detach().double().T * scale + change[:-1]
    steps = []
    for moments, shared, column in zip(mixed, overlap, columns, strict=True):
        moments.reduce()
        head_weight = weight[column]
        left = ridge(moments.gram, moments.cross - shared @ change, strength) @ head_weight.T
        steps.append(left @ torch.linalg.pinv(head_weight @ head_weight.T, hermitian=True))
    direction = torch.stack(steps)
    if pair.model.get_submodule(heads.path).bias is None:
        direction[:, -1] = 0
    return direction


def _mixed_sources(model: nn.Module, place: Place, heads: ValueHeads, batch: Batch) -> Iterator[Tensor]:
    """Per head the rows ``[rows, source channels + 1]`` that its values are a linear map of.

    The projection's input is linear in the values, whatever the operator: its coefficients are read off by giving the
    value projection weights that pass a few source channels on at a time.
    """
    value = model.get_submodule(heads.path)
    assert isinstance(value, nn.Linear)
    rows = torch.tensor(heads.rows, device=value.weight.device)
    columns = torch.tensor(heads.columns, device=value.weight.device)
    again = calling(model, batch, heads.owner, Tap(place.projection))
    count, width = value.in_features, rows.shape[1]
    weight, bias = value.weight.detach().clone(), None if value.bias is None else value.bias.detach().clone()
    parts = []
    try:
        with torch.no_grad():
            value.weight[rows.flatten()] = 0
            if value.bias is not None:
                value.bias[rows.flatten()] = 0
            for start in range(0, count, width):
                channels = torch.arange(start, min(start + width, count), device=rows.device)
                value.weight[rows[:, : len(channels)].flatten()] = 0
                value.weight[rows[:, : len(channels)], channels] = 1
                parts.append(tokens(again())[..., columns[:, : len(channels)]])
                value.weight[rows.flatten()] = 0
            if value.bias is not None:
                value.bias[rows.flatten()] = 1
                parts.append(tokens(again())[..., columns[:, :1]])
            else:
                parts.append(torch.zeros_like(parts[-1][..., :1]))
    finally:
        with torch.no_grad():
            value.weight.copy_(weight)
            if bias is not None:
                value.bias.copy_(bias)
    mixed = torch.cat(parts, dim=-1).flatten(0, 1).double()
    yield from mixed.unbind(1)


def _step_moments(pair: Pair, place: Place, heads: ValueHeads, direction: Tensor, chosen: Tensor) -> Moments:
    """Moments of the projection's input before the step, its change by the whole step, and a one."""
    linear = pair.linear(place)
    moments = Moments(2 * linear.in_features + 1, linear.out_features, direction.device)
    moved = _value_parameters(pair.model, heads, direction)
    still = {name: pair.model.get_parameter(name).detach().clone() for name in moved}
    for batch, x, error, weights in pair.rows(place, chosen):
        again = calling(pair.model, batch, heads.owner, Tap(place.projection))
        write(pair.model, moved)
        try:
            stepped = features(again())
        finally:
            write(pair.model, still)
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
    value = model.get_submodule(heads.path)
    assert isinstance(value, nn.Linear)
    rows = torch.tensor(heads.rows, device=value.weight.device)
    weight = value.weight.detach().clone()
    weight[rows] += change[:, :-1].transpose(1, 2).to(weight)
    new = {f"{heads.path}.weight": weight}
    if value.bias is not None:
        bias = value.bias.detach().clone()
        bias[rows] += change[:, -1].to(bias)
        new[f"{heads.path}.bias"] = bias
    return new
