"""Training loops on converted models, with what torch and timm bring for them."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from small_conversions import batches, converted_model, logits, swin, transformers_vit, vit
from spawned import serve
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn


def train(model, steps=8, **autocast):
    """The losses of some steps on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = next(batches(1, 8))
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            loss = F.cross_entropy(logits(model(images)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_losses_fall(model):
    losses = train(model.train())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_losses_fall_under_autocast(model):
    losses = train(model.train(), amp=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (vit, {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}),
        (swin, {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}),
        (transformers_vit, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
    ],
)
def test_dropout_and_drop_path_train(make, rates):
    model = converted_model(make, "neighborhood", {"kernel_size": 3}, **rates).train()
    images, _ = next(batches(1))
    assert not torch.equal(logits(model(images)), logits(model(images)))
    assert train(model, 12)[-1] < 2
    model.eval()
    assert torch.equal(logits(model(images)), logits(model(images)))


def test_moving_averages_follow(model):
    averages = [timm.utils.ModelEmaV3(model, decay=0.5), timm.utils.ModelEmaV2(model, decay=0.5)]
    swa = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)]
    before = copy.deepcopy(model)
    train(model.train(), 2)
    for average in averages:
        average.update(model)
    for average in swa:
        average.update_parameters(model)
    update_bn([images for images, _ in batches()], swa[0])
    images, _ = next(batches(1))
    model.eval(), before.eval()
    for average in (*averages, *swa):
        made = logits(average.eval().module(images))
        assert made.isfinite().all()
        assert not torch.equal(made, logits(before(images)))
    parameters = zip(averages[0].module.parameters(), before.parameters(), model.parameters(), strict=True)
    for ours, old, new in parameters:
        assert torch.allclose(ours, (old + new) / 2, atol=1e-6)


def test_functional_calls_have_gradients(model):
    images, labels = next(batches(1))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    others = {name: (2 * value).detach().requires_grad_() for name, value in parameters.items()}
    loss = F.cross_entropy(logits(functional_call(model, (others, buffers), (images,))), labels)
    found = torch.autograd.grad(loss, list(others.values()), allow_unused=True)
    assert torch.equal(logits(functional_call(model, model.state_dict(), (images,))), logits(model(images)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = torch.autograd.grad(
        F.cross_entropy(logits(model(images)), labels), list(parameters.values()), allow_unused=True
    )
    for name, one, other in zip(parameters, found, expected, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.allclose(one, other, atol=1e-6), name


def test_a_spawned_process_runs_it(model):
    images, _ = next(batches(1))
    context = torch.multiprocessing.get_context("spawn")
    given = context.Queue()
    process = context.Process(target=serve, args=(pickle.dumps(model), images.numpy(), given))
    process.start()
    made = torch.from_numpy(given.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert torch.allclose(made, logits(model(images)), atol=1e-5)
