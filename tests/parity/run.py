"""``make golden DIR=…``: compare every golden file under a directory with our modules, one line per file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from golden import Deviation, Golden, compare  # noqa: E402 - after what makes it importable
from subjects import subject_of  # noqa: E402 - after what makes it importable

DTYPES = (torch.float64, torch.float32)


def main(directory: str) -> int:
    """Exit status 0 if all files hold, 1 if one does not, 2 if there is none."""
    folder = Path(directory)
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        print(f"no golden files (*.safetensors) under {folder}", file=sys.stderr)
        return 2
    failed = sum(not line(path, path.relative_to(folder)) for path in files)
    print(f"{len(files) - failed} of {len(files)} files hold")
    return int(failed > 0)


def line(path: Path, name: Path) -> bool:
    """Print one file's relative errors in both precisions; whether they hold."""
    parts, holds = [], True
    for dtype in DTYPES:
        try:
            golden = Golden.read(path)
            deviations = compare(golden, subject_of(golden), dtype)
        except Exception as cause:  # a file that cannot be compared is one that does not hold
            reason = next(iter(str(cause).splitlines()), "")
            parts, holds = [f"{type(cause).__name__}: {reason}"], False
            break
        gradients = [one for one in deviations if one.name.startswith("grad")]
        results = [one for one in deviations if not one.name.startswith("grad")]
        broken = [one for one in deviations if not one.holds]
        holds = holds and not broken
        parts.append(f"{str(dtype).removeprefix('torch.')} output {worst(results)} gradients {worst(gradients)}")
        parts += [f"{one.name} {one.value:.1e} > {one.tolerance:.0e}" for one in broken[:3]]
    print(f"{'ok  ' if holds else 'FAIL'} {name!s:48} {'; '.join(parts)}", flush=True)
    return holds


def worst(deviations: list[Deviation]) -> str:
    return f"{max(one.value for one in deviations):.1e}" if deviations else "none"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 2 else "usage: run.py DIRECTORY")
