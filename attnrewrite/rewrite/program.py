"""A rewritten module's forward, as source code generated from its graph.

Source rather than a graph object, because it pickles, it reads, ``torch.compile`` sees ordinary Python, and the
signature stays the donor's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import CodeGen
from torch.fx.node import has_side_effect
from torch.utils._pytree import (
    MappingKey,
    SequenceKey,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from ..capture import NodeRef
from ..capture.keywords import is_read
from ..errors import ConversionError, Refusal
from .editable import OWN
from .outline import Outlined
from .size_course import expect_extents

_ALLOWED = (type(None), bool, int, float, str)
_REMEDY = "convert the model with example inputs that make this call, or use `keep`"


@dataclass
class Program:
    """``forward(module, *args, **kwargs)`` of a rewritten module. ``names`` are the globals its source refers to."""

    source: str
    names: dict[str, Any]
    forward: FunctionType = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scope = dict(self.names)
        exec(compile(self.source, "<attnrewrite program>", "exec"), scope)
        self.forward = scope["forward"]

    def traced_by(self, tracer: Any) -> FunctionType:
        """The forward for a tracer of ``torch.fx``: every function that it calls, and every core, is one step."""
        is_leaf = tracer.is_leaf_module

        def is_step(module: nn.Module, name: str) -> bool:
            return name.rpartition(".")[2].startswith(OWN) or is_leaf(module, name)

        tracer.is_leaf_module = is_step  # of this trace alone
        scope: dict[str, Any] = {
            name: _step(value) if isinstance(value, FunctionType) else value for name, value in self.names.items()
        }
        exec(compile(self.source, "<attnrewrite program>", "exec"), scope)
        forward: FunctionType = scope["forward"]
        return forward

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: value.__name__ for name, value in self.names.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.names.items() if name not in modules}
        return {"source": self.source, "modules": modules, "others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source = state["source"]
        modules = {name: __import__(path, fromlist=["_"]) for name, path in state["modules"].items()}
        self.names = modules | state["others"]
        self.__post_init__()


def _step(function: FunctionType) -> Callable[..., Any]:
    def traced(*args: Any, **kwargs: Any) -> Any:
        proxy = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return traced


def program_of(outlined: Outlined) -> Program:
    """Generate the program of ``outlined``."""
    code = _ForwardCode(outlined)
    outlined.graph.set_codegen(code)
    generated = outlined.graph.python_code("self")
    return Program(generated.src, {**generated.globals, **code.names})


@has_side_effect
def expect_same(what: str, given: Any, captured: Any) -> None:
    """An argument that was a plain value at capture must have that value again.

    Raises:
        ConversionError: naming the argument.
    """
    if type(given) is not type(captured) or given != captured:
        raise ConversionError(
            f"{what} was {captured!r} when this module was converted and is {given!r} now; the rewritten forward holds "
            f"for the captured call only: {_REMEDY}"
        )


@has_side_effect
def expect_keywords(what: str, given: dict[str, Any], captured: frozenset[str], needed: list[str], read: Any) -> None:
    """Keyword arguments beyond the ``captured`` ones must be none that the donor's code may have ``read``, which would
    be passed over in silence: a mask, a request for attention weights. The ``needed`` ones must be there.

    Raises:
        ConversionError: naming the argument.
    """
    for name in needed:
        if name not in given:
            raise ConversionError(
                f"{what}[{name!r}] was passed when this module was converted and is missing now; {_REMEDY}"
            )
    for name in given:
        if name not in captured and is_read(name, read):
            raise ConversionError(
                f"{what}[{name!r}] was not passed when this module was converted; the rewritten forward does not "
                f"know it: {_REMEDY}"
            )


@has_side_effect
def expect_constant(what: str, given: torch.Tensor | None, captured: torch.Tensor) -> None:
    """A constant that the rewritten forward passes over, such as a mask that its core makes itself, must be the same.

    One that is the same for all keys masks nothing, and may have another extent, or not be given. One of another shape,
    that of another image, is not compared, and neither is what has no values, as under a compiler.

    Raises:
        ConversionError: naming the argument.
    """
    if torch.compiler.is_compiling() or (given is not None and (given.is_meta or isinstance(given, FakeTensor))):
        return
    uniform = captured.ndim > 0 and bool((captured == captured[..., :1]).all())
    if given is None:
        same, now = uniform, "None"
    else:
        reference, now = given[..., :1] if uniform else captured.to(given.device), str(list(given.shape))
        same = (not uniform and given.shape != captured.shape) or bool((given == reference).all())
    if not same:
        raise ConversionError(
            f"{what}, {now}, is not what it was when this module was converted; the rewritten forward does not read "
            f"it: {_REMEDY}"
        )


@has_side_effect
def expect_structure(what: str, given: Any, captured: Any) -> None:
    """A list, tuple or mapping must have as many parts, under the same keys, as at capture.

    Raises:
        ConversionError: naming the argument.
    """
    if captured is None:
        return
    if isinstance(captured, dict):
        same = isinstance(given, dict) and given.keys() == captured.keys()
    else:
        same = isinstance(given, tuple | list) and len(given) == len(captured)
    if not same:
        raise ConversionError(
            f"{what} had {len(captured)} parts when this module was converted, and has others now; the rewritten "
            f"forward holds for the captured call only: {_REMEDY}"
        )
    for key in captured if isinstance(captured, dict) else range(len(captured)):
        expect_structure(f"{what}[{key!r}]", given[key], captured[key])


@has_side_effect
def expect_alias(what: str, first: Any, other: Any) -> None:
    """Two arguments that were one tensor at capture must be one again.

    Raises:
        ConversionError: naming the arguments.
    """
    if first is not other:
        raise ConversionError(
            f"{what} were the same tensor when this module was converted and differ now; attention of one value to "
            "another is not what was converted: exclude this site with keep="
        )


@has_side_effect
def expect_table(what: str, shape: torch.Size, captured: tuple[int, ...]) -> None:
    """A bias table must not be resized behind a rewritten module, which reads it by position.

    Raises:
        ConversionError: naming the table.
    """
    if tuple(shape) != captured:
        raise ConversionError(
            f"{what} had shape {list(captured)} when this module was converted and has {list(shape)} now; set the "
            "model's size first, then convert it"
        )


class _ForwardCode(CodeGen):
    """Writes the donor's signature, unpacks its arguments, and packs the result as the donor does."""

    def __init__(self, outlined: Outlined) -> None:
        super().__init__()
        self.outlined = outlined
        self.keywords = _keywords(outlined.module)
        self.read = None if self.keywords is None else outlined.donor.keywords_read.get(outlined.call.path)
        self.names: dict[str, Any] = {
            "expect_same": expect_same, "expect_keywords": expect_keywords, "expect_alias": expect_alias,
            "expect_extents": expect_extents, "expect_table": expect_table, "expect_constant": expect_constant,
            "expect_structure": expect_structure,
        }  # fmt: skip

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        call = self.outlined.call
        lines: list[str] = []
        needed: list[str] = []
        seen: dict[Any, str] = {}
        passed_over = self.outlined.passed_over()
        leaves = tree_flatten_with_path(call.arguments)[0]
        for placeholder, (path, leaf) in zip(self.outlined.leaves, leaves, strict=True):
            keyword = self._keyword(path)
            if keyword is not None and not placeholder.users and not is_read(keyword, self.read):
                continue
            spelled = _spelled(path)
            if keyword is not None:
                needed.append(keyword)
            if isinstance(leaf, NodeRef):
                lines.append(f"    {placeholder.name} = {spelled}")
                if leaf.node in seen:
                    lines.append(
                        f"    expect_alias({f'{seen[leaf.node]} and {spelled}'!r}, {seen[leaf.node]}, {spelled})"
                    )
                elif placeholder.users:
                    extents = self.outlined.fixed.get(placeholder, ())
                    if any(extent is not None for extent in extents):
                        lines.append(f"    expect_extents({spelled!r}, {spelled}.shape, {extents})")
                elif placeholder in passed_over:
                    captured = self._constant(passed_over[placeholder])
                    lines.append(f"    expect_constant({spelled!r}, {spelled}, {captured})")
                seen[leaf.node] = spelled
                continue
            if placeholder.users:
                lines.append(f"    {placeholder.name} = {spelled}")
            if placeholder in self.outlined.fixed:
                lines.append(f"    expect_same({spelled!r}, {spelled}, {self._constant(leaf)})")
        structures = [
            f"    expect_structure({name!r}, {name}, {self._constant(_skeleton(value))})"
            for name, value in call.arguments.items()
            if isinstance(value, tuple | list | dict) and name != self.keywords
        ]
        lines += [
            f"    expect_table({name!r}, {_attribute(name)}.shape, {shape})"
            for name, shape in self.outlined.tables.items()
        ]
        return "\n".join([f"def forward(self, {self._signature()}):", *self._keywords(needed), *structures, *lines])

    def _keyword(self, path: tuple[Any, ...]) -> str | None:
        """The name of an argument that came in with ``**kwargs``, or holds the leaf at ``path``."""
        return str(path[1].key) if len(path) > 1 and path[0].key == self.keywords else None

    def _keywords(self, needed: list[str]) -> list[str]:
        if self.keywords is None:
            return []
        captured, read = frozenset(self.outlined.call.arguments[self.keywords]), self.read
        stated = f"{self._constant(captured)}, {sorted(set(needed))}, {self._constant(read)}"
        return [f"    expect_keywords({self.keywords!r}, {self.keywords}, {stated})"]

    def generate_output(self, output_args: Any, *args: Any, **options: Any) -> str:
        structure = self.outlined.call.output
        leaves = [leaf.name if isinstance(leaf, fx.Node) else self._constant(leaf) for leaf in output_args]
        if isinstance(structure, NodeRef):
            return f"return {leaves[0]}"
        if type(structure) in (tuple, list) and not any(isinstance(part, tuple | list | dict) for part in structure):
            inner = ", ".join(leaves)
            return f"return [{inner}]" if type(structure) is list else f"return ({inner},)"
        self.names["tree_unflatten"], self.names["result_structure"] = tree_unflatten, tree_flatten(structure)[1]
        return f"return tree_unflatten([{', '.join(leaves)}], result_structure)"

    def _signature(self) -> str:
        spelled: list[str] = []
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        for parameter in inspect.signature(self.outlined.module.forward).parameters.values():
            default = ""
            if parameter.default is not parameter.empty:
                default = f"={self._constant(parameter.default)}"
            star = stars.get(parameter.kind, "")  # type: ignore[call-overload]  # a kind is an enumeration
            if parameter.kind == parameter.KEYWORD_ONLY and "*" not in "".join(spelled):
                spelled.append("*")
            spelled.append(f"{star}{parameter.name}{default}")
        return ", ".join(spelled)

    def _constant(self, value: Any) -> str:
        if isinstance(value, _ALLOWED) and value == value and value not in (float("inf"), float("-inf")):
            return repr(value)
        name = f"constant_{len(self.names)}"
        self.names[name] = value
        return name


def _keywords(module: nn.Module) -> str | None:
    """The name of a ``**kwargs`` parameter, if there is one."""
    parameters = inspect.signature(module.forward).parameters.values()
    return next((p.name for p in parameters if p.kind == p.VAR_KEYWORD), None)


def _skeleton(value: Any) -> Any:
    """Lists, tuples and mappings without what they hold."""
    if isinstance(value, dict):
        return {key: _skeleton(part) for key, part in value.items()}
    return [_skeleton(part) for part in value] if isinstance(value, tuple | list) else None


def _attribute(name: str) -> str:
    """``blocks.0.table`` of the module as the expression ``getattr(self.blocks, '0').table``."""
    text = "self"
    for part in name.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def _spelled(path: tuple[Any, ...]) -> str:
    """``arguments['x'][0]`` as the expression ``x[0]``."""
    text = path[0].key
    for key in path[1:]:
        if isinstance(key, SequenceKey):
            text += f"[{key.idx}]"
        elif isinstance(key, MappingKey) and isinstance(key.key, str | int):
            text += f"[{key.key!r}]"
        else:
            raise Refusal(f"its argument {text} is a structure that cannot be unpacked")
    return text
