"""A guard at the model's door: sequences do not tell a 4 x 4 map from an 8 x 2 one, images do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ConversionError


class SameAspect:
    """A forward pre-hook that refuses images of another aspect ratio than the one the model was converted at.

    Needed where a core takes its map from the length of a sequence.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 4:
                height, width = value.shape[2:]
                if height * self.width != width * self.height:
                    raise ConversionError(
                        f"an image of {height}x{width} has another aspect ratio than {self.height}x{self.width}, at "
                        "which the model was converted; convert it with example inputs of this shape"
                    )
                return


def guard_aspect(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Hold ``model`` to the aspect ratio of the example's image, if there is one."""
    image = next((value for value in example if isinstance(value, Tensor) and value.ndim == 4), None)
    if image is not None:
        release_aspect(model)
        model.register_forward_pre_hook(SameAspect(*image.shape[2:]), with_kwargs=True)


def release_aspect(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, SameAspect):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
