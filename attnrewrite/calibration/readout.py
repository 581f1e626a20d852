"""How much every token counts: a class-token model's logits are read from one token, and least squares must know it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..planning.places import Place, tokens
from .images import Images, logits
from .parallel import summed
from .streams import read_all

PROBES = 4
FLOOR = 0.01
"""What a token counts at least, beside a mean of one: tokens that are not read keep the solution steady."""


def token_weights(original: nn.Module, places: list[Place], images: Images, seed: int) -> dict[str, Tensor]:
    """Weights ``[tokens]`` of the residual stream after every place, in float64 and with a mean of one.

    A token weighs as much as the logits move with it: the mean over the images of the squared gradient of random sums
    of the logits, which is the diagonal of what an error in the stream costs at the output.
    """
    seen = [place for place in places if place.before is not None and place.after is not None]
    if not seen:  # every projection onto the stream was replaced
        return {}
    taps = [place.after for place in seen if place.after is not None]
    squares: list[Tensor | None] = [None] * len(seen)
    for batch in images.batches(images.fit):
        given = {name: value.clone().requires_grad_() for name, value in batch.items()}
        with torch.enable_grad():
            streams, output = read_all(original, given, taps)
            scores = logits(output)
        signs = torch.randint(0, 2, (PROBES, scores.shape[-1]), generator=torch.Generator().manual_seed(seed))
        for probe in (2 * signs - 1).to(scores):
            found = torch.autograd.grad((scores * probe).sum(), streams, retain_graph=True, allow_unused=True)
            for i, gradient in enumerate(found):
                if gradient is not None:
                    square = tokens(gradient).double().square().sum((0, 2))
                    before = squares[i]
                    squares[i] = square if before is None else before + square
    weights = {}
    for place, total in zip(seen, squares, strict=True):
        if total is not None:
            summed(total)
            if bool(total.any()):
                weights[place.name] = total / total.mean() + FLOOR
    return weights
