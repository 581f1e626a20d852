"""The image that a converted model was given, for what no longer sees it: hooks that note its sides, and readers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from ..capture import CapturedGraph, NodeRef, is_image
from ..errors import ConversionError
from ..ir.image_map import ImageSize, Law, Sides


class NoteImage:
    """A forward pre-hook that notes the sides of the image that a module is given."""

    def __init__(self, size: ImageSize) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = next((value for value in (*args, *kwargs.values()) if is_image(value)), None)
        if image is not None:
            self.size.note((image.shape[-2], image.shape[-1]))


class ImageSide(nn.Module):
    """A number that a parent of the module derives from the image, for a rewritten forward that is not given it.

    Args:
        size: the image.
        axis: 0 for its height, 1 for its width.
        laws: all that explain the number on every look.
    """

    def __init__(self, size: ImageSize, axis: int, laws: list[Law]) -> None:
        super().__init__()
        self.size, self.axis, self.laws = size, axis, laws

    def forward(self) -> int:
        """
        Raises:
            ConversionError: the module runs without the model, or the laws disagree on this image.
        """
        sides = {
            (image[self.axis] + offset) // stride for image in self.size.possible() for stride, offset in self.laws
        }
        if len(sides) != 1:
            raise ConversionError(
                "a size that this module takes from the model's image is not known here; call the whole model, and "
                "convert it with example inputs of this size if it refuses them"
            )
        return sides.pop()


class SameImage(nn.Module):
    """Stops a forward that holds for images of the captured sides alone, where the model was given another."""

    def __init__(self, size: ImageSize, captured: Sides) -> None:
        super().__init__()
        self.size, self.captured = size, captured

    def forward(self) -> None:
        """
        Raises:
            ConversionError: the image has other sides.
        """
        for sides in self.size.possible():
            if tuple(sides) != self.captured:
                raise ConversionError(
                    f"the image is {sides[0]}x{sides[1]}, but this module could only be converted for images of "
                    f"{self.captured[0]}x{self.captured[1]}; convert the model again with example inputs of this size"
                )


def note_images(model: nn.Module, capture: CapturedGraph, size: ImageSize) -> None:
    """Hook every module of ``model``, converted from the captured one, that is given the image: a model's other methods
    (``forward_features``) pass by its own forward."""
    forget_images(model)
    images = {NodeRef(node) for node in capture.inputs if is_image(capture.tensors[node])}
    paths = {call.path for call in capture.root.walk() if any(leaf in images for leaf in tree_leaves(call.arguments))}
    for path, module in model.named_modules():
        if path in paths:
            module.register_forward_pre_hook(NoteImage(size), with_kwargs=True)


def forget_images(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, NoteImage):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


__all__ = ["ImageSide", "NoteImage", "SameImage", "forget_images", "note_images"]
