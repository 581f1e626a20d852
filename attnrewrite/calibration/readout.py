"""How much every token counts: the logits of a class-token model see one token, and least squares must know it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .images import Images, logits
from .places import Place
from .streams import read_all, tokens


def token_weights(original: nn.Module, places: list[Place], images: Images) -> Tensor | None:
    """Weights ``[tokens]`` of the last residual stream: ``tokens / readouts`` for those that the logits are read from.

    These are found by the gradient of the logits. None: all tokens count alike.
    """
    last = next((place for place in reversed(places) if place.before is not None), None)
    if last is None or last.after is None:
        return None
    batch = {name: value.clone().requires_grad_() for name, value in next(images.batches()).items()}
    with torch.enable_grad():
        (stream,), output = read_all(original, batch, [last.after])
        (gradient,) = torch.autograd.grad(logits(output).square().sum(), [stream])
    seen = tokens(gradient).abs().amax((0, 2))
    readout = seen > 1e-6 * seen.max()
    if bool(readout.all()) or not bool(readout.any()):
        return None
    return torch.where(readout, len(readout) / int(readout.sum()), 1.0).double()
