"""Every whole model at full size: any image, forward and backward."""

from __future__ import annotations

import pytest
import torch

from attnrewrite.models import create_model, list_models
from attnrewrite.numerics.error import relative_error


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_forward_and_backward(name):
    model = create_model(name, num_classes=10).train()
    logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert missing == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", [(192, 288), (231, 197)])  # not square; odd, which most of the official code refuses
def test_samples_of_other_images_do_not_meet(name, size):
    model, images = create_model(name, num_classes=10).eval(), torch.randn(2, 3, *size)
    with torch.no_grad():
        together, alone = model(images), model(images[1:])
    assert together.shape == (2, 10)
    assert relative_error(together[0], alone[0]) > 1e-3
    assert relative_error(together[1:], alone) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_bfloat16_rounds_and_no_more(name):
    model, image = create_model(name, num_classes=10).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(image)
        halved = model.bfloat16()(image.bfloat16())
    for rounded in (cast, halved):
        assert rounded.dtype == torch.bfloat16
        assert relative_error(rounded.float(), expected) < 0.1  # 0.05 at most was seen, of a model of 50
