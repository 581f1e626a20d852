"""The native kernels under the address and undefined-behavior sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attnrewrite.backends.native import build
from plugins import ROOT

HERE = Path(__file__).resolve().parent
FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

ATTEND = f"""
import sys, torch
sys.path += {[str(HERE), str(HERE.parent / "shared")]!r}
torch.ops.load_library(sys.argv[1])
kernels = torch.ops.attnrewrite_native
MAPS = [((7, 7), 7, 1, 0), ((1, 33), 1, 1, 3), ((9, 20), 3, 2, 0), ((5, 6, 7), 3, 1, 2), ((40,), 13, 3, 1)]
for slides in (True, False):
    for grid, size, step, extras in MAPS:
        for channels, dtype in ((1, torch.float32), (19, torch.float32), (32, torch.bfloat16)):
            rank, places = len(grid), size ** len(grid)
            query, key, value = (torch.randn(2, *grid, 2, channels, dtype=dtype) for _ in range(3))
            bias = torch.randn(2, *[2 * size - 1 if slides else size] * rank)
            shared = [torch.randn(2, extras, 2, channels, dtype=dtype) for _ in range(2)] if extras else [None, None]
            terms = torch.randn(2, *grid, extras, dtype=dtype) if extras else None
            by_place, post = torch.randn(2, *grid, places, dtype=dtype), torch.randn(2, *grid, 2, places, dtype=dtype)
            rest = (query, key, value, bias, *shared, terms, by_place, post, [size] * rank, [step] * rank, slides, 0.3)
            output, lse = kernels.local_attention(*rest)
            kernels.local_attention_backward(output, lse, *rest)
for shape in ((2, 1, 1, 3), (1, 9, 6, 19), (2, 7, 13, 32)):
    for side, dtype in ((3, torch.float32), (5, torch.bfloat16)):
        gate, value = (torch.randn(shape, dtype=dtype) for _ in range(2))
        filters = (torch.randn(side, side, shape[-1]), torch.randn(shape[-1]))
        for activation in ("identity", "gelu", "gelu_tanh", "silu", "relu"):
            output = kernels.conv_glu(gate, *filters, value, activation, activation)
            kernels.conv_glu_backward(output, [True] * 4, gate, *filters, value, activation, activation)
kernels.exponential(torch.randn(1001))
print("done")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # an instrumented build is slow
@pytest.mark.skipif(build.obstacle() is not None, reason=f"native kernels: {build.obstacle()}")
def test_no_kernel_leaves_its_memory_or_does_what_is_undefined(tmp_path):
    runtimes = [_runtime(name) for name in ("libasan.so", "libubsan.so")]
    if None in runtimes:
        pytest.skip("the compiler has no sanitizers as libraries")
    binary = build.build(tmp_path, FLAGS)
    environment = os.environ | {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", ATTEND, str(binary)],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr[-4000:]


def _runtime(name: str) -> str | None:
    """The path of a library of the compiler; GCC alone names it."""
    asked = subprocess.run([*build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = asked.stdout.strip()
    return path if os.path.isabs(path) else None
