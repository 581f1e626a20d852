"""A call that is interrupted at any stage leaves the model, the process and the random state as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import images, small_model
from test_threads import process_wide
from untouched import Counting, assert_untouched, values_of

import attnrewrite

PACKAGE = str(Path(attnrewrite.__file__).parent.parent)


class Stop(KeyboardInterrupt):
    """What somebody who presses Ctrl-C raises: no library may swallow it, or count on its not coming."""


class Profile:
    """Counts the calls of the library's functions by file, in this thread; raises at one of them."""

    def __init__(self, file=None, number=None):
        self.file, self.number, self.calls = file, number, {}

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(PACKAGE) or "/tests/" in file or "/.venv/" in file:
            return
        self.calls[file] = self.calls.get(file, 0) + 1
        if file == self.file and self.calls[file] == self.number:
            sys.setprofile(None)
            raise Stop(f"{file}, call {self.number}")


def build(name):
    torch.manual_seed(0)
    return (Counting().double(), torch.randn(1, 3, 32, 32).double()) if name == "counting" else (
        small_model(name), images(name, 1)
    )  # fmt: skip


CALLS = {
    "convert": lambda model, batch: attnrewrite.convert(model, "aggregated", batch, inplace=True, progress=False),
    "convert_swin": lambda model, batch: attnrewrite.convert(model, "identity", batch, inplace=True, progress=False),
    "explain": attnrewrite.explain,
    "analyze": attnrewrite.analyze,
}
MODELS = {"convert": "timm_vit", "convert_swin": "torchvision_swin", "explain": "counting", "analyze": "timm_vit"}


def stages(call):
    """``(file, number)`` of the first and the last call, and one between, of every file of the library that runs."""
    model, batch = build(MODELS[call])
    with Profile() as seen:
        CALLS[call](model, batch)
    return [
        (file, number)
        for file, count in sorted(seen.calls.items())
        for number in sorted({1, (count + 1) // 2, count})
    ]


LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("call", "every"),
    [
        ("convert", 40),
        ("convert_swin", 120),
        ("explain", 20),
        ("analyze", 20),
        *(pytest.param(call, 1, marks=LONG) for call in CALLS),
    ],
)
def test_an_interruption_at_any_stage_leaves_everything_as_it_was(call, every):
    reached = stages(call)[::every]
    assert len(reached) >= 30 // every
    model, batch = build(MODELS[call])
    before, process = values_of(model), process_wide()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    stopped = 0
    for file, number in reached:
        try:
            with Profile(file, number):
                CALLS[call](model, batch)
        except Stop:
            stopped += 1
        else:
            if call.startswith("convert"):
                attnrewrite.revert(model)
        assert_untouched(model, before)
        assert process_wide() == process
        assert torch.equal(torch.get_rng_state(), state)
    assert stopped > len(reached) / 2


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "torchvision_vit", "counting"])
def test_explain_plan_and_analyze_leave_the_model_as_it_was(name):
    model, batch = build(name)
    model.train()
    model.register_forward_hook(lambda *_: None)
    before, process = values_of(model), process_wide()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    str(attnrewrite.explain(model, batch))
    str(attnrewrite.plan(model, "neighborhood", batch))
    str(attnrewrite.analyze(model, batch))
    assert_untouched(model, before)
    assert process_wide() == process
    assert torch.equal(torch.get_rng_state(), state)
