"""The way through the house is one way: which room may know which, read from the source alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from plugins import ROOT, run

ROOMS = [
    "errors", "version", "torchvision_compat", "hosts", "numerics", "operators", "capture", "functional", "lowering",
    "backends", "graph", "ir", "algebra", "modules", "models", "cores", "lift", "certify", "patterns", "reports",
    "rewrite", "planning", "calibration", "costs", "api", "__main__", "",
]  # fmt: skip
"""A room knows those before it, never those behind it; the last is the package itself, which shows what is public."""

PACKAGES = {"attnrewrite": "attnrewrite", "patterns": "attnrewrite.patterns", "backends": "attnrewrite.backends"}
"""Names of modules by the folders that they lie in."""

PLUGGED_INTO = {
    "attnrewrite.operators.dispatch": "attnrewrite.backends",
    "attnrewrite.planning.registry": "attnrewrite.patterns",
}
"""The registries, and what each looks through; by this way alone something below reaches up, and it knows no names."""

ACROSS_ROOMS = {
    "shared": "models and oracles that tests of several rooms use",
    "sizes": "a model at another size, batch or mode goes through capture, lift and rewrite together",
    "parity": "stored results of the official implementations, for layers, models and operators alike",
    "workflows": "other people's trainers and explainers around a model that is converted already",
}
"""Folders of tests that no single room could have."""


def source_files() -> dict[str, Path]:
    """Paths by names of modules."""
    files = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join((package, *parts)).removesuffix(".__init__")] = path
    return files


FILES = source_files()
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(name: str) -> Iterator[str]:
    """Modules of this project that a file imports: anywhere in it, for types alone too."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (whole if (whole := f"{base}.{alias.name}") in FILES else base for alias in node.names)


def room(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


GRAPH = {name: {other for other in imported(name) if other in FILES and other != name} for name in FILES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One way round, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_its_place_and_is_there():
    assert {room(name) for name in FILES} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))
    assert sum(len(others) for others in GRAPH.values()) > 500  # the drawing is not empty


def test_the_order_is_the_one_that_is_written_down():
    text = (ROOT / "docs" / "architecture.md").read_text()
    (listed,) = re.findall(r"^    errors ·[^\n]*\n(?:    [^\n]+\n)*", text, flags=re.MULTILINE)
    assert [name.strip(" \n/") for name in listed.split("·")] == ROOMS[: ROOMS.index("__main__")]


def test_folders_of_tests_are_rooms_or_cross_them_for_a_reason():
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders - {*ROOMS, "recognize", "targets"} == set(ACROSS_ROOMS)


def test_no_room_knows_one_behind_it():
    arrows = {(room(one), room(other)): one for one, others in GRAPH.items() for other in others}
    back = {arrow: file for arrow, file in arrows.items() if ROOMS.index(arrow[0]) < ROOMS.index(arrow[1])}
    assert back == {}


def test_files_import_each_other_in_no_circle():
    assert circle(GRAPH) == []


def test_only_registries_import_by_the_names_of_rooms():
    """What is imported by a string is on no drawing: only discovery does that, of a whole folder."""
    named = {}
    for name, tree in TREES.items():
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if found := {text for text in strings if isinstance(text, str) and text in FILES and "." in text}:
            named[name] = found
    assert named == {name: {folder} for name, folder in PLUGGED_INTO.items()}


def test_patterns_and_backends_list_nothing():
    """Their folders are looked through: nothing has to be entered anywhere."""
    for package in ("backends", "patterns", "patterns.targets", "patterns.recognize"):
        assert GRAPH[f"attnrewrite.{package}"] == set()


def test_the_drawing_sees_every_kind_of_import(monkeypatch):
    source = """
from typing import TYPE_CHECKING
import attnrewrite.errors
if TYPE_CHECKING:
    from .plan import Plan
def function():
    from ..graph import dataflow
    from ..capture import capture
"""
    monkeypatch.setitem(TREES, "attnrewrite.planning.stages", ast.parse(source))
    seen = {name for name in imported("attnrewrite.planning.stages") if name in FILES}
    rooms = ("errors", "planning.plan", "graph.dataflow", "capture")
    assert seen == {f"attnrewrite.{name}" for name in rooms}


def test_a_circle_is_seen():
    assert circle({"one": {"two"}, "two": {"three"}, "three": {"one"}, "four": {"one"}})


def test_importing_the_package_imports_none_of_its_rooms(tmp_path):
    """It costs next to nothing beside the import of torch, and waits for no library that a user may not need."""
    code = """
import sys, attnrewrite
print(sorted(name for name in sys.modules if name.startswith("attnrewrite.")))
print([name for name in ("torch", "sympy", "timm", "transformers", "rich", "tqdm") if name in sys.modules])
print(attnrewrite.convert.__name__, "attnrewrite.costs" in sys.modules)
"""
    assert run(code, tmp_path).splitlines() == ["[]", "[]", "convert False"]


def test_errors_alone_need_no_torch(tmp_path):
    """What catches errors of the library waits for nothing."""
    assert run("import sys, attnrewrite.errors; print('torch' in sys.modules)", tmp_path) == "False\n"
