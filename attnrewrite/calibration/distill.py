"""Train the converted model towards the original's logits, beside a control: the same training of an exact copy.

Training has a floor that is not the original. The control shows it: below it no training helps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .images import BATCH, Images, call, logits
from .parallel import processes, summed
from .settings import Calibration

STEPS, LEARNING_RATE = 40, 1e-3


def distill(model: nn.Module, original: nn.Module, images: Images, settings: Calibration) -> None:
    """Train all weights of ``model``, in place and in eval mode, on the images that are not held out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr or LEARNING_RATE, weight_decay=0.0)
    steps = settings.steps or STEPS
    order = _order(images.fit, steps, settings.seed)
    for chosen in tqdm(order, total=steps, desc="distill", disable=None if settings.progress else True, leave=False):
        batch = next(images.batches(chosen))
        with torch.no_grad():
            wanted = logits(call(original, batch)).log_softmax(-1)
        with torch.enable_grad():
            optimizer.zero_grad()
            actual = logits(call(model, batch)).log_softmax(-1)
            F.kl_div(actual, wanted, log_target=True, reduction="batchmean").backward()
        _average_gradients(model)
        optimizer.step()
    optimizer.zero_grad()


def control(original: nn.Module, images: Images, settings: Calibration) -> nn.Module:
    """A copy of the original after the same training."""
    twin = copy.deepcopy(original)
    distill(twin, original, images, settings)
    return twin


def _order(fit: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pending: list[Tensor] = []
    for _ in range(steps):
        pending = pending or list(fit[torch.randperm(len(fit), generator=generator)].split(BATCH))
        yield pending.pop()


def _average_gradients(model: nn.Module) -> None:
    count = processes()[1]
    for parameter in model.parameters():
        if count > 1 and parameter.grad is not None:
            summed(parameter.grad)
            parameter.grad /= count
