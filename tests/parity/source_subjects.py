"""Blocks of the model libraries: our counterpart is the block itself, converted to ``identity``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from golden import Golden, Subject

import attnrewrite
from attnrewrite.torchvision_compat import ensure_torchvision


def build(golden: Golden) -> Subject:
    ensure_torchvision()
    library, _, name = golden.official_class.partition(":")
    block_class = find_class(library, name)
    options = golden.constructor
    if "config" in options:
        options["config"] = config_of(block_class)(**options["config"])
    module = block_class(**options)
    more = tuple(tuple(value) if isinstance(value, list) else value for value in golden.call.get("args", []))

    def run(inputs):
        arguments = (inputs["input"], *more)
        example = (inputs["input"].detach(), *more)
        converted = attnrewrite.convert(module, "identity", example, inplace=True, progress=False)
        output = converted(*arguments)
        return {"output": output[0] if isinstance(output, tuple) else output}

    return Subject(module, run)


def find_class(library, name):
    """``module.Class`` or ``Class`` somewhere among a library's models."""
    models = importlib.import_module(f"{library}.models")
    path, _, name = name.rpartition(".")
    for found in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
        short = found.name.removeprefix(f"{models.__name__}.")
        if path and path not in (short, short.rpartition(".")[2]):
            continue
        if library == "transformers" and not may_hold(short, name):
            continue
        members = vars(importlib.import_module(found.name))
        if inspect.isclass(members.get(name)) and members[name].__module__ == found.name:
            return members[name]
    raise LookupError(f"no class {name} in {models.__name__}")


def may_hold(module, name):
    """transformers has hundreds of modules, each named after the prefix of its classes."""
    folder, _, file = module.partition(".")
    return file.startswith("modeling_") and name.lower().startswith(folder.replace("_", ""))


def config_of(block_class):
    """The configuration class beside a transformers block."""
    module = importlib.import_module(block_class.__module__.replace("modeling_", "configuration_"))
    named = (value for key, value in vars(module).items() if key.endswith("Config"))
    return next(value for value in named if value.__module__ == module.__name__)
