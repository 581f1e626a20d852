"""Every whole model at full size: any image, forward and backward."""

from __future__ import annotations

import pytest
import torch

from attnrewrite.models import create_model, list_models


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
def test_other_images(name):
    model = create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for size in ((192, 288), (231, 197)):  # not square; odd, which most of the official code refuses
            assert torch.isfinite(model(torch.randn(1, 3, *size))).all()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(torch.randn(1, 3, 224, 224))).all()
        halved = model.bfloat16()
        assert torch.isfinite(halved(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))).all()
