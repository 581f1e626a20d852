"""Analysis only looks: nothing of the model changes, and nothing of it runs."""

import torch

from attnrewrite import analyze
from attnrewrite.hosts.loading import load_model

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def small_vit():
    return load_model("timm:vit_tiny_patch16_224", **SMALL).eval()


def test_the_model_is_left_as_it_was():
    model = small_vit().train()
    called = []
    model.blocks[0].register_forward_hook(lambda *_: called.append(1), always_call=True)
    model.blocks[1].register_forward_pre_hook(lambda *_, **__: called.append(1), with_kwargs=True)
    handle = model.register_forward_hook(lambda *_: called.append(1), prepend=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inside = {name: sorted(vars(module)) for name, module in model.named_modules()}
    generator = torch.random.get_rng_state()
    report = analyze(model)
    assert report.total
    assert report.training.backward
    str(analyze(model, to="neighborhood"))
    str(report)
    assert called == []
    assert all(module.training for module in model.modules())
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == inside
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    model(torch.zeros(1, 3, 64, 64))
    assert called == [1, 1, 1]
    handle.remove()
    assert not model._forward_hooks


def test_weights_that_a_hook_makes_are_counted_as_weights():
    """Hooks never run, in the count and in the capture alike; the weights that they left behind are there."""
    model = small_vit()
    expected = analyze(model).total
    torch.nn.utils.weight_norm(model.blocks[0].mlp.fc1)
    report = analyze(model)
    assert report.total == expected
    assert all(check.equal for check in report.checks)
