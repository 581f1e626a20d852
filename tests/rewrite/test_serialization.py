"""Copies, pickles and saved files of a converted model."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from model_queries import rewritten_names, run
from pairs import CONVERSIONS
from small_models import difference

import attnrewrite

ROOT = Path(__file__).resolve().parent.parent.parent


def test_deepcopy_is_independent(pair):
    expected = run(pair.converted, pair.batch)
    copied = copy.deepcopy(pair.converted)
    assert torch.equal(run(copied, pair.batch), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(run(pair.converted, pair.batch), expected)
    assert difference(run(copied, pair.batch), expected) > 1e-3


def test_pickle_round_trip(pair):
    restored = pickle.loads(pickle.dumps(pair.converted))
    assert torch.equal(run(restored, pair.batch), run(pair.converted, pair.batch))
    assert rewritten_names(restored) == rewritten_names(pair.converted)
    assert str(attnrewrite.report(restored)) == str(attnrewrite.report(pair.converted))


LOADING = """
import json, sys, torch
sys.path.insert(0, {root!r})
from attnrewrite.torchvision_compat import ensure_torchvision
ensure_torchvision()
found = {{}}
for path in sys.argv[1:]:
    saved = torch.load(path, weights_only=False)
    with torch.no_grad():
        output = saved["model"](saved["batch"])
    output = getattr(output, "logits", output)
    found[path] = float((output - saved["expected"]).abs().max())
    rewritten = [m for m in saved["model"].modules() if hasattr(m, "attnrewrite_rewriting")]
    assert rewritten, path
print(json.dumps(found))
"""


def test_a_saved_model_loads_in_a_fresh_process(pairs, tmp_path):
    paths, failures = [], []
    for name, to in CONVERSIONS:
        try:
            pair = pairs(name, to)
        except Exception as cause:
            failures.append(f"{name} {to}: {cause}")
            continue
        paths.append(str(tmp_path / f"{name}-{to}.pt"))
        saved = {"model": pair.converted, "batch": pair.batch, "expected": run(pair.converted, pair.batch)}
        torch.save(saved, paths[-1])
    code = LOADING.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert list(errors) == paths
    assert max(errors.values()) < 1e-12
    assert not failures
