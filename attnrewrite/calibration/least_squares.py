"""Refit the output projection of one place in closed form.

The converted model's stream after the place shall be the original's: with ``x`` the projection's input and ``e`` the
difference of the two streams, ``e - x d`` is to be small, so that earlier errors are repaired too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CalibrationError
from ..numerics.ridge import ridge
from ..planning.places import LinearMap, Place, ValueHeads, tokens
from .images import Batch, Images
from .moments import Moments
from .parallel import agreed
from .streams import read


@dataclass
class Refit:
    """New values of parameters, by name, and the weighted squared stream error on held-out images before and after."""

    what: str
    parameters: dict[str, Tensor]
    before: float
    after: float

    @property
    def wins(self) -> bool:
        return self.after < self.before


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
        assert place.projection is not None
        for batch in self.images.batches(chosen):
            x, after = read(self.model, batch, [place.projection.input, place.after])
            (wanted,) = read(self.original, batch, [place.after])
            error = tokens(wanted).double() - tokens(after).double()
            yield batch, features(place.projection.rows(x)), error.flatten(0, 1), self.token_weights(place, error)

    def scale(self, place: Place) -> Tensor:
        """The layer scale, or ones, ``[channels]`` in float64."""
        if place.scale is not None:
            return self.model.get_parameter(place.scale).detach().double().flatten()
        weight, _ = self.projection(place)
        return torch.ones(len(weight), dtype=torch.float64, device=weight.device)

    def projection(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output projection as they are now."""
        assert place.projection is not None
        return parameters_of(self.model, place.projection)

    def check(self, place: Place) -> None:
        """See on a few images that ``after = before + scale * projection(x)`` with tokens in the same order.

        Raises:
            CalibrationError: it is not so; the message is the reason.
        """
        assert place.after is not None
        assert place.projection is not None
        batch = {name: value[:2] for name, value in next(self.images.batches()).items()}
        taps = [place.projection.input, place.after] + ([place.before] if place.before else [])
        with torch.no_grad():
            given, after, *before = read(self.model, batch, taps)
            x = place.projection.rows(given)
            branch = F.linear(x, *self.projection(place)) * self.scale(place).to(x.dtype)
        if x.shape[:2] != tokens(after).shape[:2]:
            raise CalibrationError("its projection does not see the tokens in the order of the residual stream")
        expected = branch + (tokens(before[0]) if before else 0)
        tolerance = 1e-4 if after.dtype in (torch.float32, torch.float64) else 5e-2
        if not float((expected - tokens(after)).norm()) <= tolerance * float(tokens(after).norm()):
            raise CalibrationError("the residual stream after it is not the stream before it plus its projection")


def features(x: Tensor) -> Tensor:
    """Rows ``[images * tokens, channels + 1]`` in float64, with a one at the end for the projection's bias."""
    rows = x.flatten(0, 1).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def correct_bias(pair: Pair, place: Place) -> Refit:
    """The output projection's bias moved by the mean error."""
    if pair.projection(place)[1] is None:
        raise CalibrationError("its output projection has no bias")
    fit, held = (_moments(pair, place, half) for half in (pair.images.fit, pair.images.held))
    change = torch.zeros_like(fit.cross)
    change[-1] = fit.cross[-1] / fit.gram[-1, -1]
    agreed(change)
    new = projection_parameters(pair, place, change)
    return Refit("bias", new, held.error(), held.error(change))


def refit_projection(pair: Pair, place: Place, strength: float) -> Refit:
    """Ridge regression of the output projection towards its old weights."""
    fit, held = (_moments(pair, place, half) for half in (pair.images.fit, pair.images.held))
    change = solved(fit, pair.projection(place)[1] is not None, strength)
    agreed(change)
    return Refit("projection", projection_parameters(pair, place, change), held.error(), held.error(change))


def solved(moments: Moments, biased: bool, strength: float) -> Tensor:
    """The ridge solution ``[features + 1, channels]``, with no change of a bias that the projection does not have."""
    used = len(moments.cross) - (not biased)
    change = torch.zeros_like(moments.cross)
    change[:used] = ridge(moments.gram[:used, :used], moments.cross[:used], strength)
    return change


def projection_parameters(pair: Pair, place: Place, change: Tensor) -> dict[str, Tensor]:
    """New weight and bias from a change in units of the stream; a channel that the layer scale closes stays."""
    assert place.projection is not None
    weight, bias = pair.projection(place)
    scale = pair.scale(place)
    unscaled = torch.where(scale == 0, 0.0, change / torch.where(scale == 0, 1.0, scale))
    new = {place.projection.weight: weight + unscaled[:-1].T.to(weight)}
    if bias is not None:
        assert place.projection.bias is not None
        new[place.projection.bias] = bias + unscaled[-1].to(bias)
    return new


def write(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)


def parameters_of(model: nn.Module, named: LinearMap | ValueHeads) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as they are now, without their gradients; writing to them changes the model."""
    bias = None if named.bias is None else model.get_parameter(named.bias).detach()
    return model.get_parameter(named.weight).detach(), bias


def _moments(pair: Pair, place: Place, chosen: Tensor) -> Moments:
    weight, _ = pair.projection(place)
    moments = Moments(weight.shape[1] + 1, len(weight), weight.device)
    for _, x, error, weights in pair.rows(place, chosen):
        moments.add(x, error, weights)
    moments.reduce()
    return moments
