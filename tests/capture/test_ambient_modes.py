"""What stands around a conversion does not change it: inference mode, autocast, gradients on or off."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch
from small_models import assert_same_gradients, difference, gradients, images, small_model

import attnrewrite
from attnrewrite.errors import ArgumentError

MODES = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("name", ["timm_vit", "transformers_swin"])
@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_is_the_same_inside(mode, name):
    model, batch = small_model(name), images(name)

    def converted(around):
        torch.manual_seed(0)
        with around():
            print(attnrewrite.explain(model, batch[:1]))
            return attnrewrite.convert(model, "manhattan", batch[:1], progress=False, lce=False)

    inside, outside = converted(MODES[mode]), converted(nullcontext)
    assert attnrewrite.report(inside).to_json() == attnrewrite.report(outside).to_json()
    assert all(not value.is_inference() for value in inside.state_dict().values())
    with torch.no_grad():
        ours, theirs = (getattr(each(batch), "logits", each(batch)) for each in (inside, outside))
    assert difference(ours, theirs) < 1e-12
    assert_same_gradients(gradients(inside, batch), gradients(outside, batch))


def test_a_model_made_in_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        model = small_model("timm_vit")
    with pytest.raises(ArgumentError, match="made in inference mode"):
        attnrewrite.convert(model, "identity", images("timm_vit", 1), progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    """A bfloat16 counts to 256 only: tokens of a map are more."""
    model = small_model("timm_vit", img_size=(288, 320)).float()
    batch = images("timm_vit", 1, torch.float32, (288, 320))

    def converted():
        return attnrewrite.convert(model, "neighborhood", batch, kernel_size=5, progress=False)

    expected = converted()
    torch.set_default_dtype(dtype)
    try:
        actual = converted()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        assert difference(actual(batch), expected(batch)) < 1e-6


def test_the_meta_device_as_default_is_refused_by_name():
    model, batch = small_model("timm_vit"), images("timm_vit", 1)
    with torch.device("meta"), pytest.raises(ArgumentError, match="default device is meta"):
        attnrewrite.convert(model, "identity", batch, progress=False)


def test_modes_are_as_before_afterwards():
    model, batch = small_model("timm_vit"), images("timm_vit", 1)
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode())
        modes.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        attnrewrite.convert(model, "identity", batch, progress=False)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
