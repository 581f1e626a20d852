"""Packages of other people, installed as pip would leave them: a module, and a ``dist-info`` with an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, group: str, value: str, source: str, name: str = "") -> None:
    """Put the module that ``value`` (``module`` or ``module:OBJECT``) names into ``folder``, under an entry point."""
    module = value.partition(":")[0]
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name or module} = {value}\n")


def run(code: str, folder: Path) -> str:
    """What ``code`` prints in a process of its own that finds this checkout, and what is installed in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
