"""Measured choice: the fastest is chosen, and what was measured serves later processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from attention_cases import random

from attnrewrite.functional import axial_attention
from attnrewrite.lowering import Backend, autotune, register_backend, select_backend
from attnrewrite.operators import AxialProblem, dispatch
from attnrewrite.operators.autotune import cache_folder
from attnrewrite.operators.backend import Request

MAPS = [random(1, 4, 6, 2, 3).float().transpose(1, 2) for _ in range(3)]
REQUEST = Request.of(AxialProblem(*MAPS, None, 1, 0.5))


class Counted:
    """A backend that takes so long, whatever it says that it costs."""

    def __init__(self, name: str, seconds: float, cost: float) -> None:
        self.calls, self.seconds, self.strides = 0, seconds, set()
        self.backend = Backend(name, {"axial_attention": self.run}, lambda request: cost)

    def run(self, problem):
        self.calls += 1
        self.strides.add(problem.query.stride())
        time.sleep(self.seconds)
        return problem.empty_results()


@pytest.fixture
def rivals(monkeypatch, tmp_path):
    """One that is said to be slow and is not, and one that is said to be fast."""
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path))
    pair = Counted("honest", 0.0, 1.0), Counted("boaster", 0.02, 0.0)
    monkeypatch.setattr(dispatch, "_backends", {})
    monkeypatch.setattr(dispatch, "_discover", lambda: None)
    dispatch._selected.cache_clear()
    for each in pair:
        register_backend(each.backend)
    yield pair
    dispatch._selected.cache_clear()


def test_without_it_the_modeled_cost_decides(rivals):
    assert select_backend(REQUEST).name == "boaster"
    assert not cache_folder().exists()


def test_the_measured_time_decides_once_and_stays_on_disk(rivals):
    honest, boaster = rivals
    with autotune():
        assert select_backend(REQUEST).name == "honest"
        calls = honest.calls, boaster.calls
        assert min(calls) > 1
        assert select_backend(REQUEST).name == "honest"
        assert select_backend(REQUEST, "boaster").name == "boaster"
        with autotune(False):
            assert select_backend(REQUEST).name == "boaster"
        dispatch._selected.cache_clear()  # as in a new process
        assert select_backend(REQUEST).name == "honest"
    assert (honest.calls, boaster.calls) == calls
    assert honest.strides == {MAPS[0].stride()}  # operands lie in memory as those of the call
    (file,) = cache_folder().iterdir()
    assert set(json.loads(file.read_text())["seconds"]) == {"honest", "boaster"}


def test_another_problem_or_thread_count_is_measured_by_itself(rivals):
    threads = torch.get_num_threads()
    with autotune():
        select_backend(REQUEST)
        axial_attention(*MAPS, 0)
        assert len(list(cache_folder().iterdir())) == 2
        try:
            torch.set_num_threads(threads + 1)
            dispatch._selected.cache_clear()
            select_backend(REQUEST)
        finally:
            torch.set_num_threads(threads)
    assert len(list(cache_folder().iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {"honest": "fast"}}', '{"seconds": {"honest": 1.0}}'])
def test_a_file_that_says_nothing_is_measured_again(rivals, content):
    with autotune():
        select_backend(REQUEST)
        (file,) = cache_folder().iterdir()
        file.write_text(content)
        dispatch._selected.cache_clear()
        assert select_backend(REQUEST).name == "honest"
    assert set(json.loads(file.read_text())["seconds"]) == {"honest", "boaster"}


def test_a_disk_that_takes_nothing_costs_no_more_than_the_time(rivals, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "file"))
    with autotune():
        assert select_backend(REQUEST).name == "honest"


def test_the_random_state_and_autograd_stay_as_they_are(rivals):
    state = torch.get_rng_state()
    with autotune():
        select_backend(REQUEST)
    assert torch.equal(torch.get_rng_state(), state)


SCRIPT = """
import torch
from attnrewrite.functional import axial_attention
maps = [torch.randn(1, 6, 7, 2, 8) for _ in range(3)]
axial_attention(*maps, 1)
"""


def test_processes_may_measure_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path))
    monkeypatch.setenv("ATTNREWRITE_AUTOTUNE", "1")
    both = [subprocess.Popen([sys.executable, "-c", SCRIPT]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (file,) = cache_folder().iterdir()  # no part of a file is left
    assert min(json.loads(file.read_text())["seconds"].values()) > 0
