"""Parity with the official implementations, from stored results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import neighborhood_subjects
import pytest
import torch
from golden import Golden, compare
from subjects import subject_of

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.rglob("*.safetensors"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def broken(deviations):
    return [f"{one.name}: {one.value:.2e} > {one.tolerance:.0e}" for one in deviations if not one.holds]


@DTYPES
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path, dtype):
    golden = Golden.read(path)
    assert broken(compare(golden, subject_of(golden), dtype)) == []


@DTYPES
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("path", sorted(FOLDER.rglob("na[123]d_*.safetensors")), ids=lambda path: path.stem)
def test_every_backend_agrees_with_natten(path, backend, dtype):
    golden = Golden.read(path)
    assert broken(compare(golden, neighborhood_subjects.build(golden, backend), dtype)) == []


def test_a_wrong_value_is_found(tmp_path):
    path = FOLDER / "neighborhood" / "na2d_k3_8x8.safetensors"
    golden = Golden.read(path)
    golden.tensors["output"][0, 3, 3, 1, 2] += 1e-6
    golden.tensors["grad/q"][0, 0, 0, 0, 0] += 1e-6
    assert [line.split(":")[0] for line in broken(compare(golden, subject_of(golden), torch.float64))] == [
        "output",
        "grad/q",
    ]


def test_the_command_reports_a_file_that_does_not_hold(tmp_path):
    (tmp_path / "spoilt.safetensors").write_bytes(b"no golden file")
    (tmp_path / "good.safetensors").write_bytes((FOLDER / "neighborhood" / "na1d_k5_L19.safetensors").read_bytes())
    script = Path(__file__).with_name("run.py")
    ran = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    good, spoilt, summary = ran.stdout.splitlines()
    assert good.startswith("ok   good.safetensors")
    assert spoilt.startswith("FAIL spoilt.safetensors")
    assert summary == "1 of 2 files hold"
