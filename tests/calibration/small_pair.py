"""The trained digit network, its conversion, and images: shared by the calibration tests."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch

import attnrewrite

sys.path.append(str(Path(__file__).parents[2] / "examples" / "calibration"))

from digits import calibration_images, test_images, trained


@cache
def original():
    return trained("vit")


@cache
def converted(kernel_size=5):
    return attnrewrite.convert(original(), "neighborhood", images(1), kernel_size=kernel_size, progress=False)


def images(count):
    return calibration_images("vit", count)


@cache
def unseen():
    """Images that no calibration was given."""
    return test_images("vit")[0][:250]


@torch.no_grad()
def error(model):
    actual, expected = model(unseen()), original()(unseen())
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def agreement(model):
    return float((model(unseen()).argmax(1) == original()(unseen()).argmax(1)).float().mean())


def calibrate(model=None, data=None, **settings):
    settings = {"n": 48, "value_step": False, "progress": False} | settings
    return attnrewrite.calibrate(model or converted(), original(), images(48) if data is None else data, **settings)


def same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
