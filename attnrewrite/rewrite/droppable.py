"""Which parts of a module nothing uses any more, once its forward is another one."""

from __future__ import annotations

from torch import nn

from .outline import Outlined


def is_droppable(name: str, outlined: Outlined) -> bool:
    """A parameter, or a child with parameters, that only this module used, once a call: left behind, it would break
    distributed training."""
    module, capture = outlined.module, outlined.capture
    parameter = dict(module.named_parameters(remove_duplicate=False)).get(name)
    if parameter is not None:
        return _is_read_alone(parameter, outlined)
    if name not in dict(module.named_modules()):
        return False
    child = module.get_submodule(name)
    calls = [outlined.donor.module_of(other) for other in capture.root.walk()]
    alone = sum(other is child for other in calls) == sum(other is module for other in calls)
    return alone and any(True for _ in child.parameters())


def _is_read_alone(parameter: nn.Parameter, outlined: Outlined) -> bool:
    """Whether nothing but the module reads it."""
    capture = outlined.capture
    own = [call for call in capture.root.walk() if call.path == outlined.call.path]
    holders = [node for node, value in capture.tensors.items() if value is parameter]
    users = [capture.position[user] for holder in holders for user in holder.users]
    return all(any(call.encloses(position) for call in own) for position in users)
