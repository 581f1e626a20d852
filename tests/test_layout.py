"""``patterns/`` and ``backends/`` are top-level folders and yet sub-packages: every way to them must agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "attnrewrite": "attnrewrite",
    "patterns": "attnrewrite/patterns",
    "backends": "attnrewrite/backends",
}

IMPORT = """
import sys, attnrewrite, attnrewrite.patterns, attnrewrite.backends
assert "patterns" not in sys.modules and "backends" not in sys.modules
print(attnrewrite.patterns.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, so that no earlier build can hide a missing file; without native kernels."""
    scratch = tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, scratch)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    environment = os.environ | {"ATTNREWRITE_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", build], cwd=scratch, env=environment, check=True, capture_output=True)
    (built,) = scratch.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_packages(wheel):
    expected = {
        f"{package}/{path.relative_to(wheel.parent / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (wheel.parent / folder).rglob("*")
        if path.is_file()
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("source", ["checkout", "wheel"])
def test_sub_packages_import(wheel, tmp_path, source, place):
    path = {"checkout": ROOT, "wheel": tmp_path / "site"}[source]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd={"root": ROOT, "elsewhere": tmp_path}[place],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from_checkout = source == "checkout" or place == "root"  # the working directory comes first on the path
    assert Path(done.stdout.strip()).is_relative_to(ROOT if from_checkout else tmp_path)


def test_no_text_names_a_path_of_one_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files are the project's")
    machine_path = re.compile(rb"(?m)(^|[^A-Za-z0-9_.])/(work|farm|root)/")
    files = [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    texts = {path: content for path in files if b"\0" not in (content := path.read_bytes())}
    assert [path for path, content in texts.items() if machine_path.search(content)] == []


SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_files_stay_small():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_functions_stay_small():
    """Docstring and signature included: none over 60 lines, nine of ten at most 20."""
    lines = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: count for name, count in lines.items() if count > 60} == {}
    assert sorted(lines.values())[len(lines) * 9 // 10] <= 20
