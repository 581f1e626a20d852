"""A module called alone, on arguments by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from ..numerics.draws import same_draws


def run_module(module: nn.Module, donor: nn.Module, arguments: dict[str, Any], training: bool) -> list[Any]:
    """The results of ``module``, or of one rewritten from ``donor``, whose signature names the arguments."""
    bound = inspect.BoundArguments(inspect.signature(donor.forward), OrderedDict(arguments))
    module.train(training)
    with same_draws(module.parameters()):
        return tree_leaves(module.forward(*bound.args, **bound.kwargs))
