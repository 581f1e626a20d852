"""Every case runs in a process of its own: what is tested is the state that imports leave behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENSURE = "from attnrewrite.torchvision_compat import ensure_torchvision; ensure_torchvision(); "

# What torchvision does at import time, whether or not its compiled operators were loaded.
DESCRIBES_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: scores)
"""


def run(code, *path):
    path = [*map(str, path), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True
    )


@pytest.fixture
def stand_in(tmp_path):
    """Write a package that goes by the name of torchvision, and fails or not in its second module."""

    def write(source):
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("from . import early, late\n")
        (package / "early.py").write_text("")
        (package / "late.py").write_text(source)
        return tmp_path

    return write


def test_model_libraries_import():
    done = run(ENSURE + "import timm, torchvision, transformers; transformers.ViTModel; ensure_torchvision()")
    assert done.returncode == 0, done.stderr


def test_repairs_after_an_earlier_failed_import():
    done = run("try:\n    import timm\nexcept RuntimeError:\n    pass\n" + ENSURE + "import timm")
    assert done.returncode == 0, done.stderr


def test_declares_missing_operators_and_imports_again(stand_in):
    folder = stand_in(DESCRIBES_OPERATORS)
    assert "operator torchvision::nms does not exist" in run("import torchvision", folder).stderr
    done = run(ENSURE + "ensure_torchvision(); import torchvision; torchvision.late", folder)
    assert done.returncode == 0, done.stderr


def test_a_declared_operator_still_refuses_to_run(stand_in):
    call = "import torch; x = torch.zeros(1, 4); torch.ops.torchvision.nms(x, x[:, 0], 0.5)"
    done = run(ENSURE + call, stand_in(DESCRIBES_OPERATORS))
    assert "NotImplementedError: Could not run 'torchvision::nms'" in done.stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("operator torchvision::other does not exist", "AttnRewriteError: torchvision does not work"),
        ("something else", "RuntimeError: something else"),
    ],
)
def test_what_cannot_be_repaired_is_loud(stand_in, error, shown):
    done = run(ENSURE, stand_in(f"raise RuntimeError({error!r})"))
    assert done.returncode != 0
    assert shown in done.stderr.splitlines()[-1]


def test_does_nothing_without_torchvision():
    done = run("sys.modules['torchvision'] = None\n" + ENSURE)
    assert done.returncode == 0, done.stderr
