"""The native kernels are built on the spot, once, and nothing breaks without them."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from attnrewrite.backends.native import build
from plugins import ROOT, run

from attnrewrite.errors import BackendError

needs_compiler = pytest.mark.skipif(build.obstacle() is not None, reason=f"native kernels: {build.obstacle()}")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A binary from source, in a folder of its own."""
    return build.build(tmp_path_factory.mktemp("native"))


@needs_compiler
def test_it_builds_from_source_and_only_once(built):
    before = built.stat().st_mtime_ns
    assert build.build(built.parent) == built
    assert built.stat().st_mtime_ns == before
    assert [path.name for path in built.parent.iterdir() if path.name != ".lock"] == [built.name]


@needs_compiler
def test_two_processes_that_build_at_once_both_get_the_binary(built, tmp_path):
    script = f"from attnrewrite.backends.native import build; print(build.build(build.Path({str(tmp_path)!r})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == [str(tmp_path / built.name)] * 2


@pytest.mark.slow
@needs_compiler
def test_every_kernel_stays_in_the_namespace_of_its_instruction_set(tmp_path):
    """A function that two instruction sets share would be the linker's choice, and crash on older processors."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm to list symbols with")
    for source in sorted((build.PACKAGE / "csrc" / "kernels").glob("*.cpp")):
        for name, flags in build._variants(source).items():
            target = tmp_path / f"{source.stem}.{name}.o"
            options = [*build.FLAGS, *flags, f"-I{build.PACKAGE / 'csrc'}"]
            subprocess.run([*build.compiler(), *options, "-c", source, "-o", target], check=True)
            listing = subprocess.run(["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True)
            shared = [line for line in listing.stdout.splitlines() if line.split()[1] in "TWVuBDR"]
            assert [line for line in shared if f"attnrewrite::{name}::" not in line] == []


@needs_compiler
def test_the_binary_needs_nothing_newer_than_the_oldest_torch(built):
    """Of torch it calls C functions alone, for their names carry no C++ types that may change."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm to list symbols with")
    listing = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    torch_library = ctypes.CDLL(str(build.torch_folder() / "lib" / "libtorch_cpu.so"))
    of_torch = {name for name in names if hasattr(torch_library, name) and "torch" in name}
    assert of_torch
    assert {name for name in of_torch if not name.startswith(("torch_", "aoti_torch_"))} == set()
    assert not any("c10" in name or name.startswith("Py") for name in names)


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no C\\+\\+ compiler was found; install"):
        build.build(tmp_path)


@needs_compiler
def test_what_the_compiler_says_is_told(monkeypatch, tmp_path):
    with pytest.raises(BackendError, match="the compiler failed"):
        build.build(tmp_path, ("-fno-such-flag",))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@needs_compiler
def test_the_command_line_builds(tmp_path, built):
    (tmp_path / "attnrewrite").mkdir()
    shutil.copy(built, tmp_path / "attnrewrite")
    done = subprocess.run(
        [sys.executable, "-m", "attnrewrite", "build"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "attnrewrite" / built.name)


@needs_compiler
def test_a_wheel_carries_the_binary_for_every_python(tmp_path, built):
    for folder in ("attnrewrite", "patterns", "backends"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "cache" / "attnrewrite").mkdir(parents=True)
    shutil.copy(built, tmp_path / "cache" / "attnrewrite")
    subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"],
        cwd=tmp_path, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert f"attnrewrite/backends/native/{built.name}" in zipfile.ZipFile(wheel).namelist()


FIND = """
import warnings
warnings.simplefilter("always")
from attnrewrite.backends.native import library
with warnings.catch_warnings(record=True) as told:
    print(library.missing())
    print(library.missing())
print(len(told))
"""


def test_without_a_binary_it_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (build.PACKAGE / build.binary_name()).exists():
        pytest.skip("the binary lies beside the sources")
    first, second, warnings = run(FIND, tmp_path).splitlines()
    assert first == second
    assert "its kernels are not built" in first
    assert warnings == "1"


def test_a_broken_binary_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if (build.PACKAGE / build.binary_name()).exists():
        pytest.skip("the binary lies beside the sources")
    (tmp_path / "attnrewrite").mkdir()
    Path(tmp_path / "attnrewrite" / build.binary_name()).write_text("no binary")
    assert "could not be loaded" in run(FIND, tmp_path).splitlines()[0]
