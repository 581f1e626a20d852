"""``examples/custom_backend`` as a user has it: installed by pip, found by its entry point, chosen where it can run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from plugins import ROOT, run

CHECK = """
import torch
from attnrewrite.errors import BackendError
from attnrewrite.functional import axial_attention
from attnrewrite.lowering import available_backends

assert "sdpa_lines" in available_backends()
maps = [torch.randn(2, 5, 6, 3, 4) for _ in range(3)]
decay = torch.tensor([-0.1, -0.2, -0.3])
for axis in (0, 1):
    found = axial_attention(*maps, axis, backend="sdpa_lines", return_lse=True)
    expected = axial_attention(*maps, axis, backend="reference", return_lse=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    try:
        axial_attention(*maps, axis, log_decay=decay, backend="sdpa_lines")
    except BackendError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    source = tmp_path_factory.mktemp("source") / "custom_backend"  # building writes beside the sources
    subprocess.run(["cp", "-r", ROOT / "examples" / "custom_backend", source], check=True)
    subprocess.run([*command, folder, source], check=True)
    return folder


def test_it_is_found_and_says_what_it_cannot(site):
    told = run(CHECK, site).splitlines()
    assert told == ["backend 'sdpa_lines' cannot run axial_attention: it has no decay"] * 2


def test_it_is_a_few_dozen_lines():
    assert len((ROOT / "examples" / "custom_backend" / "sdpa_lines.py").read_text().splitlines()) < 50
