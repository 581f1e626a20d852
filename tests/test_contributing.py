"""CONTRIBUTING.md: its code runs, top to bottom, and prints what it says; what it names is there."""

from __future__ import annotations

import re

from plugins import ROOT, run

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_code_runs_and_prints_what_is_written(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    first = "from attnrewrite.torchvision_compat import ensure_torchvision; ensure_torchvision()"
    printed = _without_errors(run("\n".join([first, *blocks]), tmp_path)).splitlines()
    (written,) = re.findall(r"^```text\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in _without_errors(written).splitlines() if line not in printed] == []


def _without_errors(text: str) -> str:
    """Rounding is of the machine."""
    return re.sub(r"\b\de[+-]\d\d\b", "#", text)


def test_commands_and_files_are_there():
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", TEXT)) <= set(targets)
    paths = re.findall(r"`((?:tests|docs|examples|requirements|benchmarks|certify)/[\w/.]*)`", TEXT)
    paths += re.findall(r"\]\(([\w/.]+)\)", TEXT)
    assert len(paths) > 5
    assert [path for path in paths if not ((ROOT / path).exists() or (ROOT / "attnrewrite" / path).exists())] == []
