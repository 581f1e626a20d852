"""The README's code runs as it is written, top to bottom, in a process of its own."""

from __future__ import annotations

import re

from plugins import ROOT, run

README = ROOT / "README.md"


def test_the_code_runs_top_to_bottom(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    first = "from attnrewrite.torchvision_compat import ensure_torchvision; ensure_torchvision()"
    printed = run("\n".join([first, *blocks]), tmp_path)
    assert "VisionTransformer" in printed


def test_what_it_names_is_there_after_import(tmp_path):
    text = README.read_text()
    named = set(re.findall(r"`(attnrewrite\.(?:functional|models|modules|analyze|calibrate)[\w.]*)", text))
    assert {"attnrewrite.models.create_model", "attnrewrite.functional.neighborhood_attention"} <= named
    run("import attnrewrite\n" + "\n".join(sorted(named)), tmp_path)
