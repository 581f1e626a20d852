"""The top-level folders ``patterns/`` and ``backends/`` install as sub-packages of ``attnrewrite``.

The native kernels are compiled where a C++ compiler and torch are at hand, unless ATTNREWRITE_NATIVE is 0. Without them
everything installs and runs, on slower backends.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shutil import copy
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = {
    "attnrewrite": "attnrewrite",
    "attnrewrite.patterns": "patterns",
    "attnrewrite.backends": "backends",
}
NATIVE = "attnrewrite/backends/native"

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
]


def native_build() -> ModuleType:
    """``backends/native/build.py``, without its package, which needs torch."""
    sys.path.insert(0, str(ROOT))  # its errors are the library's
    spec = spec_from_file_location("attnrewrite.backends.native.build", ROOT / "backends" / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPython(build_py):
    """Adds the binary of the native kernels to the packages: beside their sources if these are what will be run."""

    def run(self) -> None:
        super().run()
        native = native_build()
        reason = "ATTNREWRITE_NATIVE is 0" if os.environ.get("ATTNREWRITE_NATIVE") == "0" else native.obstacle()
        if reason is not None:
            print(f"native kernels are left out: {reason}")
            return
        folder = ROOT / "backends" / "native" if self.editable_mode else Path(self.build_lib, NATIVE)
        built = native.find() or native.build(native.cache_folder())
        if not (folder / built.name).exists():
            copy(built, folder)


class BuildWheel(bdist_wheel):
    """A wheel with the binary is for one platform, and for every Python: it speaks to torch alone."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        if not list(Path(self.bdist_dir or "", NATIVE).glob("_native.*.so")):
            return tag
        return ("py3", "none", _platform())


def _platform() -> str:
    from sysconfig import get_platform

    return get_platform().replace("-", "_").replace(".", "_")


setup(packages=packages, package_dir=FOLDERS, cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel})
