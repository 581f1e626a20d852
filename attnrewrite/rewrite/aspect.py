"""A guard at the doors of a model: sequences do not tell a 4 x 4 map from an 8 x 2 one, images do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..capture import Capture, NodeRef
from ..errors import ConversionError


class SameAspect:
    """A forward pre-hook that refuses images of another aspect ratio than the one the model was converted at.

    Needed where a core takes its map from the length of a sequence.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if _is_image(value):
                height, width = value.shape[2:]
                if height * self.width != width * self.height:
                    raise ConversionError(
                        f"an image of {height}x{width} has another aspect ratio than {self.height}x{self.width}, at "
                        "which the model was converted; convert it with example inputs of this shape"
                    )
                return


def guard_aspect(model: nn.Module, capture: Capture) -> None:
    """Hold ``model``, converted from the captured one, to the aspect ratio of the captured image, if there is one.

    The guard stands at every module that is given the image, for a model's other methods (``forward_features``) pass by
    its own forward.
    """
    image = next((node for node in capture.inputs if _is_image(capture.tensors[node])), None)
    if image is None:
        return
    release_aspect(model)
    guard = SameAspect(*capture.tensors[image].shape[2:])
    paths = {call.path for call in capture.root.walk() if NodeRef(image) in tree_leaves(call.arguments)}
    for path, module in model.named_modules():
        if path in paths:
            module.register_forward_pre_hook(guard, with_kwargs=True)


def release_aspect(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, SameAspect):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4
