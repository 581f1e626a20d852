"""An interrupted calibration goes on to the same bits, and only from a state of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from small_pair import calibrate, images, same_weights

import attnrewrite

SETTINGS = {"lsq": {"n": 24}, "distill": {"n": 24, "method": "distill", "steps": 12}}

RUN = """
import sys; sys.path[:0] = {paths!r}
from attnrewrite.torchvision_compat import ensure_torchvision; ensure_torchvision()
import torch
from small_pair import calibrate
torch.save(calibrate(resume={state!r}, **{settings!r}).state_dict(), {result!r})
"""


@pytest.mark.parametrize("method", SETTINGS)
def test_a_killed_run_resumes_to_the_same_result(tmp_path, method):
    state, settings = tmp_path / "state.safetensors", SETTINGS[method]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = RUN.format(paths=paths, state=str(state), result=str(tmp_path / "never"), settings=settings)
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (tmp_path / "never").exists(), "it was killed before its end"
    assert same_weights(calibrate(resume=state, **settings), calibrate(**settings))


def interrupt(state, after):
    """Distil until the state was written ``after`` times: at steps 10 and 12 of the model, then of the control."""
    replace, written = os.replace, []

    def interrupting(*paths):
        replace(*paths)
        written.append(paths)
        if len(written) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", interrupting)
        with pytest.raises(KeyboardInterrupt):
            calibrate(resume=state, **SETTINGS["distill"])


def test_the_control_of_a_distillation_resumes_too(tmp_path):
    state = tmp_path / "state.safetensors"
    interrupt(state, after=3)
    resumed, whole = calibrate(resume=state, **SETTINGS["distill"]), calibrate(**SETTINGS["distill"])
    assert same_weights(resumed, whole)
    assert attnrewrite.report(resumed).calibration == attnrewrite.report(whole).calibration


def test_without_what_the_optimizer_remembers_the_same_steps_lead_elsewhere(tmp_path):
    state = tmp_path / "state.safetensors"
    interrupt(state, after=1)
    with safe_open(state, framework="pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118 - a file, no dict
    for name, value in tensors.items():
        if ".exp_avg." in name:
            value.zero_()
    save_file(tensors, state, metadata=metadata)
    assert not same_weights(calibrate(resume=state, **SETTINGS["distill"]), calibrate(**SETTINGS["distill"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    state = tmp_path_factory.mktemp("finished") / "state.safetensors"
    calibrate(data=images(12), n=12, resume=state)
    return state


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"ridge": 0.1}, "different settings"),
        ({"method": "distill", "steps": 2}, "different settings"),
        ({"data": images(13)[1:]}, "different images"),
    ],
    ids=["ridge", "method", "images"],
)
def test_a_state_of_another_run_is_refused(finished, settings, what):
    with pytest.raises(attnrewrite.AttnRewriteError, match=what):
        calibrate(**{"data": images(12), "n": 12, "resume": finished} | settings)
