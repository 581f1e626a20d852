"""Does a rewritten module behave as its donor on values, at another batch and in training mode?

Alone where it runs alone, else inside the model. A check that could not run has failed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import Inputs, ModuleCall, NodeRef
from ..capture.replica import replica
from ..certify.certificate import relative_error
from ..errors import ConversionError, first_line
from ..graph.values import Values
from ..numerics.draws import same_draws
from .attention_weights import Unavailable
from .kept_values import Kept, lost_values, run_keeping
from .owners import OwnerProgram
from .rewritten import rewrite_module
from .run_module import run_module

TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Else 1e-3, relative to the largest value: float32 leaves 1e-6, a wrong axis or a swapped batch far more."""


def misbehavior(
    owner: OwnerProgram,
    model: nn.Module,
    root: ModuleCall,
    captured: Values,
    constants: Values,
    batch: int,
) -> tuple[str | None, list[str]]:
    """Compare donor and twin on two different samples, in training where that tells more, else in eval mode.

    Training mode is used when a child is an identity in eval mode (an inactive DropPath), as the graph does not show
    for sure which later use takes the child's result, and where nothing is random by element. ``owner`` must hold cores
    that keep the function; ``root`` is the call of the ``model``. Returns the reason, an empty string, or None where
    the donor does not run alone on two samples: then nothing was compared. And the names of the attributes in which
    the donor keeps what it computed.
    """
    donor = owner.module
    twin = replica(donor, own_buffers=True)
    rewrite_module(twin, owner.program, owner.modules, owner.buffers)
    with torch.no_grad():
        for training in (True, False) if owner.handed_on and not _is_random(donor) else (False,):
            chosen = _two_samples(owner, model, root, captured, constants, batch, as_given=owner.passes_over)
            found = _donor_at(donor, chosen, training)
            if found is None:
                continue
            where = "in training" if training else f"at a batch of {2 * batch}"
            try:
                try:
                    actual, still = run_keeping(twin, donor, found[0], training)
                except ConversionError:  # arguments that the model itself does not give, where samples are one sequence
                    chosen = _two_samples(owner, model, root, captured, constants, batch, as_given=True)
                    found = _donor_at(donor, chosen, training) or found
                    actual, still = run_keeping(twin, donor, found[0], training)
            except Exception as cause:
                return f"the rewritten module does not run {where}: {first_line(cause)}", []
            arguments, expected, kept = found
            reason = _difference(actual, expected)
            if reason:
                return f"the rewritten module differs from the original {where} ({reason})", []
            return "", lost_values(donor, arguments, kept, still)
    return None, []


def misbehavior_in_model(owners: list[OwnerProgram], model: nn.Module, example: Inputs, batch: int) -> str:
    """The same for modules that do not run alone, all at once: the model, and a copy with these modules rewritten.

    On two samples, or on the example inputs where the model takes no other batch.
    """
    model, twin = (replica(model, training=False, own_buffers=True) for _ in range(2))
    for owner in owners:
        owner.install(twin.get_submodule(owner.path))
    doubled = tree_map(lambda leaf: _with_another_sample(leaf, batch), example)
    for args, kwargs in (doubled, example):
        try:
            expected = _outputs(model, args, kwargs)
        except Exception:  # another batch is not for this model
            continue
        try:
            return _difference(_outputs(twin, args, kwargs), expected)
        except Exception as cause:
            return f"the model does not run with it: {first_line(cause)}"
    return "the model did not run again"


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    with torch.no_grad(), same_draws(model.parameters()):
        return tree_leaves(model(*args, **kwargs))


def _with_another_sample(leaf: Any, batch: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != batch:
        return leaf
    return torch.cat([leaf, leaf.flip(-1)])


def _difference(actual: list[Any], expected: list[Any]) -> str:
    if len(actual) != len(expected):
        return "it has other results"
    pairs = [pair for pair in zip(actual, expected, strict=True) if _is_compared(*pair)]
    if any(getattr(a, "shape", None) != e.shape for a, e in pairs):
        return "its results have other shapes"
    error = max((relative_error(a, e) for a, e in pairs), default=0.0)
    return f"error {error:.0e}" if pairs and not error <= TOLERANCE.get(pairs[0][1].dtype, 1e-3) else ""


def _two_samples(
    owner: OwnerProgram,
    model: nn.Module,
    root: ModuleCall,
    captured: Values,
    constants: Values,
    batch: int,
    as_given: bool,
) -> Iterator[dict[str, Any]]:
    """Arguments for twice the samples, in the order in which they are tried.

    A constant, such as a shared bias, stays as it is, unless the donor then does not run: it was spread over the
    samples, as a class token is. With ``as_given`` they are what the model makes of twice the samples, where it takes
    them: of a constant that the rewritten module passes over, such as a mask, too.
    """
    values = constants | captured
    given = _given_at_two_samples(owner.call, model, root, values, batch) if as_given else None
    if given is not None:
        yield given
        return
    for fixed in (constants, {}):
        yield _at_two_samples(owner.call.arguments, values, fixed, batch)


def _donor_at(
    donor: nn.Module, chosen: Iterable[dict[str, Any]], training: bool
) -> tuple[dict[str, Any], list[Any], Kept] | None:
    """The first arguments that the donor runs on, its results, and what it keeps."""
    for arguments in chosen:
        try:
            fresh = replica(donor, own_buffers=True)
            return arguments, *run_keeping(fresh, fresh, arguments, training)
        except Exception:
            continue
    return None


class _Reached(Exception):
    """Stops a model where it calls a module; ``arguments`` by parameter."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def _given_at_two_samples(
    call: ModuleCall, model: nn.Module, root: ModuleCall, values: Values, batch: int
) -> dict[str, Any] | None:
    """What the model gives a module of twice the samples; None if it does not take them, or does not come to it."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    model = replica(model, own_buffers=True)
    model.get_submodule(call.path).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run_module(model, model, _at_two_samples(root.arguments, values, {}, batch), training=False)
    except _Reached as reached:
        return reached.arguments
    except Exception:  # another batch is not for this model: then no one gives it one
        return None
    return None


def _is_compared(actual: Any, expected: Any) -> bool:
    """Numbers, but not attention weights that the rewritten module withholds."""
    return isinstance(expected, Tensor) and expected.is_floating_point() and not isinstance(actual, Unavailable)


def _at_two_samples(arguments: dict[str, Any], values: Values, fixed: Values, batch: int) -> dict[str, Any]:
    doubled: Values = dict(fixed)  # an argument given twice stays one tensor
    return tree_map(lambda leaf: _doubled(leaf, values, batch, doubled), arguments)


def _doubled(leaf: Any, captured: Values, batch: int, doubled: Values) -> Any:
    """The captured samples and as many others; what is no per-sample value stays."""
    if not isinstance(leaf, NodeRef) or leaf.node is None:
        return leaf
    if leaf.node not in doubled:
        value = captured[leaf.node]
        axis = next((axis for axis in (0, 1) if value.ndim > 1 and value.shape[axis] == batch), None)
        per_sample = axis is not None and value.is_floating_point() and not isinstance(value, nn.Parameter)
        doubled[leaf.node] = torch.cat([value, value.flip(-1)], dim=axis or 0) if per_sample else value
    return doubled[leaf.node]


def _is_random(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
