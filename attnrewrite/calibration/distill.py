"""Train the converted model towards the original's logits, beside a control: the same training of an exact copy.

Training has a floor that is not the original. The control shows it: below it no training helps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .images import BATCH, Images, call, logits
from .parallel import processes, summed
from .settings import Calibration
from .state import State

STEPS, LEARNING_RATE = 40, 1e-3
SAVE_EVERY = 10
"""Steps between two states in the file of ``resume``."""


def distill(model: nn.Module, original: nn.Module, images: Images, settings: Calibration, state: State) -> None:
    """Train all weights of ``model``, in place and in eval mode, on the images that are not held out."""
    _train("model", model, original, images, settings, state)


def control(original: nn.Module, images: Images, settings: Calibration, state: State) -> nn.Module:
    """A copy of the original after the same training."""
    twin = copy.deepcopy(original)
    _train("control", twin, original, images, settings, state)
    return twin


def _train(
    name: str, model: nn.Module, original: nn.Module, images: Images, settings: Calibration, state: State
) -> None:
    """Go on from where ``state`` has the training ``name``. Nothing is random but the order of images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr or LEARNING_RATE, weight_decay=0.0)
    steps = settings.steps or STEPS
    done = max((record["steps"] for record in state.done if record["name"] == name), default=0)
    if done:
        _restore(name, model, optimizer, state.parameters)
    order = islice(_order(images.fit, steps, settings.seed), done, None)
    progress = tqdm(
        order, desc="distill", initial=done, total=steps, disable=None if settings.progress else True, leave=False
    )
    for step, chosen in enumerate(progress, done + 1):
        _step(model, original, optimizer, next(images.batches(chosen)))
        if state.path is not None and (step == steps or step % SAVE_EVERY == 0):
            state.save({"name": name, "steps": step}, _progress(name, model, optimizer))
    optimizer.zero_grad()


def _step(model: nn.Module, original: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        wanted = logits(call(original, batch)).log_softmax(-1)
    with torch.enable_grad():
        optimizer.zero_grad()
        actual = logits(call(model, batch)).log_softmax(-1)
        F.kl_div(actual, wanted, log_target=True, reduction="batchmean").backward()
    _average_gradients(model)
    optimizer.step()


def _progress(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights, as ``name.weight.PARAMETER``, and what the optimizer remembers, as ``name.optimizer.KEY.INDEX``."""
    found = {f"{name}.weight.{key}": value.clone() for key, value in model.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"{name}.optimizer.{key}.{index}": value.clone() for key, value in values.items()}
    return found


def _restore(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(stored[f"{name}.weight.{key}"])
    start = f"{name}.optimizer."
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        if key.startswith(start):
            what, _, index = key.removeprefix(start).rpartition(".")
            remembered.setdefault(int(index), {})[what] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": remembered})


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
