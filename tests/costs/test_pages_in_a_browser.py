"""The pages as a browser shows them, offline."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import timm
import torch

import attnrewrite

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def shown(path, tmp_path):
    """The document after the browser has laid it out."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    offline = [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [CHROMIUM, *options, *offline, path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in ran.stderr
    assert not re.search(r"""(src|href)=["']?https?:""", ran.stdout)
    return ran.stdout


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_cost_page(vit, tmp_path):
    report = attnrewrite.analyze(vit, torch.zeros(1, 3, 64, 64), to="neighborhood", hardware="h200")
    page = shown(report.to_html(tmp_path / "cost.html"), tmp_path)
    assert page.count("<svg") >= 2  # scaling and roofline
    assert "blocks.{0...2}.attn" in page
    assert 'to="neighborhood"' in page or "to=&quot;neighborhood&quot;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_conversion_page(vit, tmp_path):
    plan = attnrewrite.plan(vit, "neighborhood", torch.randn(1, 3, 64, 64), kernel_size=3)
    path = tmp_path / "report.html"
    path.write_text(plan.report().to_html())
    page = shown(path, tmp_path)
    assert "blocks.{0...1}.attn" in page
    assert "PROJECTED" in page
    assert "DEAD" in page
