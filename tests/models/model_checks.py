"""What holds for every paper's model."""

from __future__ import annotations

import torch


def check_any_size(model, image, classes):
    """Forward and backward on an image of any size, all of which the logits depend on in some way."""
    image.requires_grad_()
    logits = model(image)
    assert logits.shape == (len(image), classes)
    logits.square().sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


def check_head_in_parts(model, image):
    """The head by timm's interface; the pooled features."""
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.head(pooled), model(image))
    model.reset_classifier(3)
    assert model(image).shape == (len(image), 3)
    model.reset_classifier(0)
    assert torch.equal(model(image), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(image), features)
    return features, pooled


def check_half_precision(model, image, dtype):
    """Near the float32 result, and finite gradients of every parameter that is trained."""
    expected = model(image).detach()
    with torch.autocast("cpu", dtype):
        mixed = model(image)
    found = model.to(dtype)(image.to(dtype))
    for result in (mixed, found):
        assert (result - expected).norm() / expected.norm() < 0.05
    found.float().square().sum().backward()
    assert all(part.grad.isfinite().all() for part in model.parameters() if part.requires_grad)
