"""The README's code runs as it is written, top to bottom, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=README.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_code_runs_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    printed = run("\n".join(["from attnrewrite.torchvision_compat import ensure_torchvision as e; e()", *blocks]))
    assert "VisionTransformer" in printed


def test_what_it_names_is_there_after_import():
    text = README.read_text()
    named = set(re.findall(r"`(attnrewrite\.(?:functional|models|modules|analyze|calibrate)[\w.]*)", text))
    assert {"attnrewrite.models.create_model", "attnrewrite.functional.neighborhood_attention"} <= named
    run("import attnrewrite\n" + "\n".join(sorted(named)))
