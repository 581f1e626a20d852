"""Compile the kernels of ``csrc`` into one binary, ``_native.KEY.so``.

``setup.py`` runs this file before anything is installed, so it needs the standard library alone. The binary speaks to
torch through its stable C interface and to Python not at all: one serves every torch from 2.11 on, and every Python.
Kernels (``csrc/kernels``) are compiled once for every instruction set of the processor family; ``csrc/dispatch.cpp``
chooses among them when the binary is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ...errors import BackendError

PACKAGE = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # 2.11: the oldest torch whose stable interface has all that is called

# Of what -ffast-math allows, only what changes no NaN, infinity or signed zero: products and sums may be fused (which
# rounds once instead of twice), and nobody reads errno or the floating-point exception flags.
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
)  # fmt: skip

KERNEL_FLAGS = ("-fno-exceptions",)  # kernels throw nothing, and its bookkeeping would be shared among instruction sets

X86 = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
INSTRUCTION_SETS = {"x86_64": X86, "AMD64": X86}
"""Flags by instruction set, by the name of the machine; ``csrc/dispatch.cpp`` prefers them in this order."""


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """What kernels are compiled for here. Other machines than x86 have what they need (NEON) in their baseline."""
    return INSTRUCTION_SETS.get(platform.machine(), {"baseline": ()})


def compiler() -> list[str] | None:
    """The command of the C++ compiler: ``CXX``, else the first of ``c++``, ``g++`` and ``clang++``; None without."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def torch_folder() -> Path | None:
    """Where torch lies, whose headers are needed.

    An isolated build hides what is installed from ``import``, but the interpreter still says where it would be.
    """
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    return installed if (installed / "include").exists() else None


def obstacle() -> str | None:
    """Why nothing can be built here, or None."""
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang; on Windows other backends serve"
    if compiler() is None:
        return "no C++ compiler was found; install g++ or clang++, or name one in the environment variable CXX"
    return None if torch_folder() is not None else "torch is not installed; install it first"


@cache
def binary_name() -> str:
    """Changes with every source and flag, so that an outdated binary is never loaded."""
    choices = (FLAGS, KERNEL_FLAGS, instruction_sets(), platform.system(), platform.machine())
    digest = hashlib.sha256(repr(choices).encode())
    for path in _files():
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return f"_native.{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where ``python -m attnrewrite build`` leaves the binary: this user's folder for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME")
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(home) if home else usual) / "attnrewrite"


def find() -> Path | None:
    """The binary of these very sources: beside them, as wheels carry it, or in the cache."""
    candidates = (folder / binary_name() for folder in (PACKAGE, cache_folder()))
    return next((path for path in candidates if path.exists()), None)


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile into ``folder``, unless the binary is there. Of two processes the second waits for the first.

    Raises:
        BackendError: there is no compiler or torch, or the compiler fails.
    """
    if reason := obstacle():
        raise BackendError(f"native: cannot be built: {reason}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / binary_name()
    with _lock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not path.exists():
            _compile(Path(scratch), path.name, extra_flags)
            os.replace(Path(scratch) / path.name, path)  # at once: nobody ever sees half of it
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files() -> list[Path]:
    return sorted(path for path in (PACKAGE / "csrc").rglob("*") if path.suffix in (".cpp", ".h"))


def _compile(scratch: Path, name: str, extra_flags: tuple[str, ...]) -> None:
    """Object by object, as many at a time as there are processors, then the binary ``scratch / name``."""
    torch = torch_folder()
    assert torch is not None
    base = [*(compiler() or ()), *FLAGS, f"-I{PACKAGE / 'csrc'}", "-isystem", str(torch / "include"), *extra_flags]
    jobs = []
    for source in (path for path in _files() if path.suffix == ".cpp"):
        for label, flags in _variants(source).items():
            target = scratch / f"{source.stem}.{label}.o"
            jobs.append([*base, *flags, "-c", str(source), "-o", str(target)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    # Without a search path: whoever loads the binary has loaded torch before.
    torch_library = (
        ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    )
    _run([*base, "-shared", *(job[-1] for job in jobs), *torch_library, "-o", str(scratch / name)])


def _variants(source: Path) -> dict[str, tuple[str, ...]]:
    """Flags of every object that a source becomes."""
    if source.parent.name != "kernels":
        return {"common": tuple(f"-DHAS_{name.upper()}" for name in instruction_sets())}
    return {
        name: (f"-DISA={name}", f"-DISA_{name.upper()}", *KERNEL_FLAGS, *flags)
        for name, flags in instruction_sets().items()
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"native: the compiler failed\n{shlex.join(command)}\n{done.stderr[-4000:]}")
