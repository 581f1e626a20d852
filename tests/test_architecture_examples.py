"""The examples of docs/architecture.md run as they are written: their files installed as packages, their calls called.

A block that begins with the name of a file is that file; a block of TOML is of the ``pyproject.toml`` of its package.
"""

from __future__ import annotations

import re
import tomllib

import pytest
from plugins import ROOT, install, run

TEXT = (ROOT / "docs" / "architecture.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
EXAMPLES = [name for name in SECTIONS if name.startswith("Add ")]
TORCHVISION = "from attnrewrite.torchvision_compat import ensure_torchvision; ensure_torchvision()\n"


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


def files_of(section: str) -> dict[str, str]:
    """What each named file holds."""
    named = (re.match(r"# (\w+)\.py\n", block) for block in blocks(section, "python"))
    return {match[1]: match.string for match in named if match}


def test_there_are_three_of_them():
    assert EXAMPLES == ["Add a target", "Add an operator", "Add a backend"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_as_it_is_written(name, tmp_path):
    files = files_of(SECTIONS[name])
    for module, source in files.items():
        (tmp_path / f"{module}.py").write_text(source)
    (project,) = (tomllib.loads(block)["project"] for block in blocks(SECTIONS[name], "toml"))
    ((group, entries),) = project["entry-points"].items()
    ((entry, value),) = entries.items()
    install(tmp_path, group, value, files[value.partition(":")[0]], entry)
    calls = [block for block in blocks(SECTIONS[name], "python") if block not in files.values()]
    assert calls
    run(TORCHVISION + "\n".join(calls), tmp_path)


@pytest.mark.parametrize("name", ["Add a target", "Add a backend"])
def test_what_is_added_is_one_small_file(name):
    (source,) = files_of(SECTIONS[name]).values()
    assert len(source.splitlines()) < 60


def test_every_room_has_its_paragraph():
    """Those of the drawing and no others."""
    here = {path.stem for path in (ROOT / "attnrewrite").iterdir() if path.name[0] != "_" and path.name != "py.typed"}
    named = set(re.findall(r"\*\*([a-z_/]+)\*\*", SECTIONS["The rooms"]))
    assert here - {"torchvision_compat"} <= named
    assert {name.partition("/")[0] for name in named} <= here | {"patterns", "backends"}
