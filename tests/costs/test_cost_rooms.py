"""The rooms of the costs know each other one way."""

from __future__ import annotations

import ast
from pathlib import Path

import attnrewrite.costs

COSTS = Path(attnrewrite.costs.__file__).parent
ROOMS = ("count", "sites", "report")


def imported(path: Path) -> set[tuple[str, ...]]:
    """Room and file of everything in these rooms that a file names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level in (1, 2):
            room = (path.parent.name,) if node.level == 1 else ()
            module = (*room, *(node.module or "").split("."))
            named = {(*module, alias.name) for alias in node.names}
            found |= {parts[:2] for parts in ({module} if len(module) > 1 and module[1] else named)}
    return {(room, name) for room, name in found if room in ROOMS}


GRAPH = {
    (room, path.stem): imported(path)
    for room in ROOMS
    for path in (COSTS / room).glob("*.py")
    if path.stem != "__init__"
}


def test_no_room_knows_a_later_one():
    back = {
        (source, target)
        for source, targets in GRAPH.items()
        for target in targets
        if ROOMS.index(target[0]) > ROOMS.index(source[0])
    }
    assert back == set()
    assert ("count", "cost") in GRAPH["count", "trace"]  # the graph is read
    assert ("count", "declared") in GRAPH["sites", "core_sites"]


def test_files_know_each_other_one_way():
    left = dict(GRAPH)
    while free := [file for file, targets in left.items() if not targets & left.keys()]:
        for file in free:
            del left[file]
    assert left == {}, "these files import each other in a circle"


def test_nothing_is_imported_for_type_checks_alone():
    assert [path.name for path in COSTS.rglob("*.py") if "TYPE_CHECKING" in path.read_text()] == []
