"""Conversions beside other threads that convert, run the same model, or use autocast: nobody notices the others."""

from __future__ import annotations

import builtins
import math
import threading

import pytest
import torch
from repetition import thinned
from small_models import difference, images, small_model
from torch import nn

import attnrewrite

NAMES = ["timm_vit", "transformers_swin", "timm_swin", "transformers_vit"]


def process_wide():
    """What a tracer exchanges for a while."""
    return (
        torch.autocast.__enter__, torch.autocast.__exit__, torch.is_autocast_enabled, nn.Module.__call__,
        nn.Module.__getattr__, builtins.max, builtins.min, math.pow, torch.backends.mha.get_fastpath_enabled(),
        len(torch.nn.modules.module._global_forward_hooks), torch.is_grad_enabled(), torch.get_default_dtype(),
    )  # fmt: skip


def in_threads(*calls, rounds):
    """Run every call ``rounds`` times, each in a thread of its own; what was raised."""
    raised, start = [], threading.Barrier(len(calls))

    def repeated(call):
        start.wait()
        for _ in range(rounds):
            try:
                call()
            except Exception as cause:
                raised.append(f"{type(cause).__name__}: {cause}"[:300])

    threads = [threading.Thread(target=repeated, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("name", thinned(NAMES, 2))
def test_four_threads_at_once(name, rounds):
    donor, other = small_model(name).float(), small_model("timm_vit").float()
    batch, others = images(name, 1, torch.float32), images("timm_vit", 1, torch.float32)
    before = process_wide()
    with torch.no_grad():
        expected = donor(batch)
    served = []

    def convert():
        attnrewrite.convert(donor, "neighborhood", batch, progress=False, kernel_size=3)

    def convert_another():
        attnrewrite.convert(other, "identity", others, progress=False)

    def serve():
        with torch.no_grad():
            served.extend(donor(batch) for _ in range(20))

    def cast():
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                assert other(others).isfinite().all()

    assert not in_threads(convert, convert_another, serve, cast, rounds=rounds)
    assert process_wide() == before
    first = getattr(expected, "logits", expected)
    for output in served:  # torch's exporter turns oneDNN off while it traces, for every thread: another rounding
        assert difference(getattr(output, "logits", output), first) < 2e-6
    assert not donor.training
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in donor.modules()) == 0
    converted = attnrewrite.convert(donor, "identity", batch, progress=False)
    with torch.no_grad():
        actual = converted(batch)
    assert difference(getattr(actual, "logits", actual), first) < 1e-5


def test_a_failed_capture_leaves_the_process_as_it_was():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                raise RuntimeError(f"no {self.inner(x).shape}")

    before = process_wide()
    with pytest.raises(attnrewrite.AttnRewriteError, match=r"no torch.Size"):
        attnrewrite.convert(Fails(), "identity", torch.randn(1, 4), progress=False)
    assert process_wide() == before
