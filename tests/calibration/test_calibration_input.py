"""Data and settings that a calibration cannot use are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from small_pair import calibrate, converted, images, original
from torch import nn

import attnrewrite
from attnrewrite.errors import ArgumentError, CalibrationError


def raising():
    raise OSError("the disk is gone")


def failing():
    yield images(4)
    raise OSError("the disk is gone")


def with_nan():
    broken = images(4)
    broken[2, 0, 5, 5] = float("nan")
    return broken


BAD_DATA = {
    "empty": (lambda: [], "at least 2 images are needed, got 0"),
    "one image": (lambda: images(1), "at least 2 images are needed, got 1"),
    "wrong size": (lambda: torch.zeros(4, 1, 32, 32), r"original rejects images of shape \(1, 1, 32, 32\)"),
    "no batch axis": (lambda: [torch.zeros(40)], r"expected batches \[images"),
    "shapes differ": (lambda: [images(2), torch.zeros(2, 1, 32, 32)], "all images must have one shape"),
    "nan": (with_nan, "NaN"),
    "a callable that raises": (lambda: raising, "callable raised OSError: the disk is gone"),
    "an iterator that raises": (failing, "iterating raised OSError: the disk is gone"),
    "another device": (lambda: images(4).to("meta"), "on meta and the model is on cpu"),
    "not images": (lambda: [1, 2], "expected a batch"),
    "a number": (lambda: 3, "expected images"),
    "a dict of other names": (lambda: [{"pixels": images(2)}], "none of .* is a floating-point argument"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name):
    data, message = BAD_DATA[name]
    with pytest.raises(CalibrationError, match=message):
        calibrate(data=data())


def test_data_that_ends_early_is_warned_of():
    with pytest.warns(UserWarning, match="ended after 20 of 64 images"):
        calibrate(data=images(20), n=64)


BAD_SETTINGS = [
    ({"method": "least_squares"}, "method: expected one of"),
    ({"n": 1}, "n: expected"),
    ({"n": 2.5}, "n: expected"),
    ({"holdout": 0.0}, "holdout: "),
    ({"ridge": 0.0}, "ridge: must be positive"),
    ({"ridge": float("nan")}, "ridge: must be positive"),
    ({"token_weights": "class"}, "token_weights: expected one of"),
    ({"method": "bias", "value_step": True}, "value_step: requires"),
    ({"steps": 3}, "steps, lr: require"),
    ({"method": "distill", "steps": 0}, "steps: expected"),
    ({"method": "distill", "lr": -1.0}, "lr: must be positive"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings(settings, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate(**{"value_step": None, **settings})


def test_models_that_do_not_belong_together():
    with pytest.raises(ArgumentError, match="expected a result of"):
        attnrewrite.calibrate(original(), original(), images(4), n=4)
    with pytest.raises(CalibrationError, match=r"original: its output has shape \(1, 3\)"):
        attnrewrite.calibrate(converted(), nn.Sequential(nn.Flatten(), nn.Linear(1600, 3)), images(4), n=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "auto"}, 'budget: keep="auto" needs'),
        ({"budget": 0.1}, 'budget: requires keep="auto"'),
        ({"keep": "auto", "budget": {"accuracy": 0.9}}, "budget: must set error or agreement"),
        ({"keep": "auto", "budget": {"agreement": 95}}, "budget: agreement must be between 0 and 1"),
        ({"keep": "auto", "budget": -1.0}, "budget: error must be positive"),
        ({"calibrate": images(4), "inplace": True}, "inplace: "),
    ],
    ids=["no budget", "no keep", "unknown", "percent", "negative", "inplace"],
)
def test_bad_arguments_of_convert(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(original(), "neighborhood", images(1), kernel_size=5, progress=False, **arguments)


def test_a_state_of_something_else_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"no state")
    with pytest.raises(CalibrationError, match="not a calibration state"):
        calibrate(resume=state)
