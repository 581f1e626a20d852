"""Calibration images: taken from whatever the user has, checked, and split into those fitted to and those held out."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CalibrationError, first_line
from .parallel import processes, summed

BATCH = 32
"""Images a forward pass. Fixed, so that results do not depend on how the data came in batches."""

POSITIONAL = ""
Batch = dict[str, Tensor]
"""Tensors by the name of the argument; the name of a single positional one is empty."""


@dataclass
class Images:
    """All images on the host, by argument, ``[images, ...]`` each; ``fit`` and ``held`` index them."""

    arguments: Batch
    device: torch.device
    fit: Tensor
    held: Tensor

    def batches(self, chosen: Tensor | None = None) -> Iterator[Batch]:
        """Batches of all images, or of the ``chosen``, on the model's device."""
        count = len(next(iter(self.arguments.values())))
        for part in (torch.arange(count) if chosen is None else chosen).split(BATCH):
            yield {name: value[part].to(self.device) for name, value in self.arguments.items()}

    def fingerprint(self) -> str:
        """Changes with any image, also of another process."""
        digest = hashlib.sha256()
        for name, value in sorted(self.arguments.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        total = torch.tensor(list(digest.digest()))
        summed(total)
        return " ".join(map(str, total.tolist()))


class Replay:
    """An iterator's items, as often as they are asked for."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._seen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self._seen
        for item in self._items:
            self._seen.append(item)
            yield item


def call(model: nn.Module, batch: Batch) -> Any:
    return model(batch[POSITIONAL]) if POSITIONAL in batch else model(**batch)


def logits(output: Any) -> Tensor:
    """The tensor of a model's output that is compared: ``.logits`` if it has them, else its first floating one."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise CalibrationError(
        f"original: output contains no tensor to compare, got {type(output).__name__}; pass a model that returns one"
    )


def collect(
    data: Any, n: int, model: nn.Module, *, holdout: float = 0.0, seed: int = 0, least: int = 1,
) -> Images:  # fmt: skip
    """Take ``n`` images over all processes, at least ``least``, and hold a share of them out.

    Image ``i`` of process ``r`` of ``w`` is image ``i * w + r`` of the whole, as a DistributedSampler deals them.

    Raises:
        CalibrationError: the data cannot be used; the message says why.
    """
    rank, world = processes()
    wanted = len(range(rank, n, world))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = list(_taken(_batches_of(data), wanted, model, device))
    count = sum(len(next(iter(part.values()))) for part in parts)
    arguments = {name: torch.cat([part[name] for part in parts])[:wanted] for name in (parts[0] if parts else ())}
    count = min(count, wanted)
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = count
    summed(counts)
    if int(counts.sum()) < least or not count:
        raise CalibrationError(f"data: at least {least} images are needed, got {count}; pass about 256")
    if count < wanted and holdout:
        warnings.warn(f"calibration data ended after {count} of {wanted} images; continuing with these", stacklevel=4)
    place = torch.arange(count) * world + rank
    order = torch.randperm(int(counts.max()) * world, generator=torch.Generator().manual_seed(seed))
    present = order[order // world < counts[order % world]]
    held_count = min(max(round(holdout * len(present)), least - 1), len(present) - 1)
    held = torch.isin(place, present[:held_count])
    return Images(arguments, device, torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0])


def _batches_of(data: Any) -> Iterator[Any]:
    if callable(data) and not isinstance(data, Iterable):
        try:
            data = data()
        except Exception as cause:
            raise CalibrationError(
                f"data: the callable raised {type(cause).__name__}: {first_line(cause)}; it is called without "
                "arguments"
            ) from cause
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise CalibrationError(
            f"data: expected images [images, ...], an iterable of batches or a callable that returns one, "
            f"got {type(data).__name__}"
        )
    iterator = iter(data)
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as cause:
            raise CalibrationError(f"data: iterating raised {type(cause).__name__}: {first_line(cause)}") from cause


def _taken(batches: Iterator[Any], wanted: int, model: nn.Module, device: torch.device) -> Iterator[Batch]:
    shapes: dict[str, tuple[int, ...]] = {}
    accepted = inspect.signature(model.forward).parameters
    count = 0
    while count < wanted:
        item = next(batches, None)
        if item is None:
            return
        batch = {name: value.detach() for name, value in _arguments(item, accepted).items()}
        for name, value in batch.items():
            _check(value, shapes.setdefault(name, tuple(value.shape[1:])), device)
        sizes = {len(value) for value in batch.values()}
        if len(sizes) > 1 or batch.keys() != shapes.keys():
            raise CalibrationError(
                "data: every batch needs the arguments of the first, all of one length; got a batch that differs"
            )
        count += sizes.pop()
        yield {name: value.cpu() for name, value in batch.items()}


def _arguments(item: Any, accepted: Mapping[str, Any]) -> Batch:
    if isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, Mapping):
        found = {k: v for k, v in item.items() if k in accepted and isinstance(v, Tensor) and v.is_floating_point()}
        if found:
            return found
        raise CalibrationError(
            f"data: none of {list(item)} is a floating-point argument of the model's forward; name the images as it "
            "does"
        )
    if not isinstance(item, Tensor):
        raise CalibrationError(f"data: expected a batch to be a tensor, a tuple or a dict, got {type(item).__name__}")
    return {POSITIONAL: item}


def _check(value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if value.dim() < 2:
        raise CalibrationError(f"data: expected batches [images, ...], got shape {tuple(value.shape)}")
    if tuple(value.shape[1:]) != shape:
        raise CalibrationError(
            f"data: all images must have one shape, got {tuple(value.shape[1:])} after {shape}; resize them"
        )
    if value.device.type not in ("cpu", device.type):
        raise CalibrationError(f"data: images are on {value.device} and the model is on {device}; move them to either")
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError("data: an image contains NaN or infinity; remove it")
