"""A stand-in for a model on the meta device: its structure without its numbers, able to take other image sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...capture.examples import Inputs, example_inputs_for
from ...errors import ArgumentError, AttnRewriteError, CaptureError, first_line
from .meta_copy import meta_copy, on_meta
from .trace import Trace, trace


def meta_inputs(inputs: Inputs) -> Inputs:
    args, kwargs = tree_map(lambda leaf: on_meta(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return args, kwargs


class SizeTracer:
    """Traces one model at any image size and batch, by whatever means the model has of taking another size.

    Args:
        model: only read.
        example: the arguments of one call; tensors of four axes are images ``[batch, channels, height, width]``.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self.model = model
        self.example = meta_inputs(example)
        images = [leaf for leaf in tree_leaves(self.example) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        batch, _, height, width = images[0].shape if images else (1, 0, 0, 0)
        self.batch: int = batch
        self.size: tuple[int, int] = (height, width)
        self._traces: dict[tuple[int, tuple[int, int], bool], Trace | None] = {}

    @property
    def has_image(self) -> bool:
        return self.size != (0, 0)

    @property
    def takes_example(self) -> bool:
        """Whether the model runs at the example's size as it is."""
        try:
            self.at_example()
        except AttnRewriteError:
            return False
        return True

    def at_example(self, training: bool = False) -> Trace:
        """The trace of the example call itself.

        Raises:
            ArgumentError: the model takes another size.
            CaptureError: the model does not run on shapes alone.
        """
        key = (self.batch, self.size, training)
        if self._traces.get(key) is None:
            try:
                args, kwargs = self.example
                self._traces[key] = trace(meta_copy(self.model), args, kwargs, training=training)
            except Exception as cause:
                self._require_its_size(cause)
                raise CaptureError(
                    f"{type(self.model).__name__} does not run on shapes alone ({first_line(cause)}): its cost depends "
                    "on values, or it creates tensors on a fixed device; analyze a submodule that does not"
                ) from cause
        found = self._traces[key]
        assert found is not None
        return found

    def _require_its_size(self, cause: Exception) -> None:
        """A model that runs at the size it states, and not at the example's, is told apart from one that never does."""
        try:
            stated = example_inputs_for(self.model)
            trace(meta_copy(self.model), (on_meta(stated),), {})
        except Exception:
            return
        height, width = stated.shape[-2:]
        raise ArgumentError(
            f"example_inputs: {type(self.model).__name__} rejects {self.size[0]}x{self.size[1]} "
            f"({first_line(cause)}); build it for that size, or analyze it at {height}x{width} and ask the report's "
            f"at({self.size[0]}, {self.size[1]})"
        ) from cause

    def at(self, height: int, width: int, batch: int | None = None, training: bool = False) -> Trace | None:
        """The trace at another size; None if the model takes it by no known means."""
        size, batch = (height, width), self.batch if batch is None else batch
        if size == self.size and batch == self.batch:
            return self.at_example(training)
        key = (batch, size, training)
        if key not in self._traces:
            self._traces[key] = self._resized(batch, size, training)
        return self._traces[key]

    def _resized(self, batch: int, size: tuple[int, int], training: bool) -> Trace | None:
        def other(leaf: Any) -> Any:
            image = isinstance(leaf, Tensor) and leaf.ndim == 4
            return leaf.new_empty(batch, leaf.shape[1], *size) if image else leaf

        for prepare in _MEANS if size != self.size else (_as_it_is,):
            try:
                model = meta_copy(self.model)
                args, kwargs = tree_map(other, self.example)
                kwargs = kwargs | prepare(model, size)
                return trace(model, args, kwargs, training=training)
            except Exception:  # a size that a model refuses can end in any error; the next means may take it
                continue
        return None


def _as_it_is(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    return {}


def _unstrict(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """timm's hierarchical models check the size, and make their shift mask once, unless told otherwise."""
    for module in model.modules():
        for name, value in (("strict_img_size", False), ("dynamic_mask", True)):
            if name in vars(module):
                setattr(module, name, value)
    return {}


def _set_input_size(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """timm's plain transformers resample their position embedding; windowed ones would become other models."""
    windows = {module: vars(module)["window_size"] for module in model.modules() if "window_size" in vars(module)}
    model.set_input_size(img_size=size)  # type: ignore[operator]  # nn.Module says: a tensor or module
    if any(vars(module)["window_size"] != before for module, before in windows.items()):
        raise ArgumentError("size: the windows of this model would change with it; analyze the model at that size")
    return {}


def _interpolated(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """transformers' models interpolate their position embedding when the call says so."""
    return {"interpolate_pos_encoding": True}


def _longer_embedding(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """torchvision's vision transformer fixes one side and one position embedding."""
    patch, embedding = model.patch_size, model.encoder.pos_embedding
    cells = (size[0] // patch) * (size[1] // patch)
    prefix = embedding.shape[1] - (model.image_size // patch) ** 2
    model.encoder.pos_embedding = nn.Parameter(embedding.new_empty(1, cells + prefix, embedding.shape[2]))
    model.image_size = _AnySide()
    return {}


class _AnySide:
    """Equal to every side."""

    __hash__ = None  # type: ignore[assignment]  # what is equal to everything has no hash

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


_MEANS: tuple[Callable[[nn.Module, tuple[int, int]], dict[str, Any]], ...] = (
    _as_it_is, _unstrict, _set_input_size, _interpolated, _longer_embedding,
)  # fmt: skip
