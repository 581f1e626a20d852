"""What is done to a replica is not done to its model, whatever the model holds; and the copy that a conversion is."""

from __future__ import annotations

import copy
from abc import ABC
from collections import OrderedDict, deque
from functools import partial
from typing import Generic, TypeVar

import pytest
import torch
from model_queries import weights_of
from small_models import assert_same_gradients, gradients, images, small_model
from torch import nn
from torch.nn.utils import prune
from untouched import Counting, assert_untouched, values_of

import attnrewrite
from attnrewrite.capture.replica import independent, replica

Item = TypeVar("Item")


class Frozen(OrderedDict):
    """As configurations are: nothing can be set once it is made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__frozen = True

    def __setitem__(self, key, value):
        if "_Frozen__frozen" in vars(self):
            raise TypeError("read-only")
        super().__setitem__(key, value)

    def _refuse(self, *args, **kwargs):
        raise TypeError("read-only")

    __delitem__ = update = pop = setdefault = clear = _refuse


class Slotted:
    __slots__ = ("kept",)


class Holder(Slotted, nn.Module):
    """Modules in every place where a module may be, and containers of every kind."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.again = self.inner
        self.listed = [nn.Linear(2, 2), {"deep": (nn.Linear(2, 2),)}]
        self.register_buffer("count", torch.zeros(()))
        self.config = Frozen(sides=[1, 2], name="frozen")
        self.method, self.bound = self.changed, partial(self.changed, self.inner)
        self.recent, self.kept = deque([1], maxlen=2), [1]
        self.__dict__["aside"] = self.inner

    def changed(self, module):
        return self, module


def test_a_replica_has_modules_and_containers_of_its_own():
    model = Holder()
    twin = replica(model)
    assert type(twin) is Holder
    assert twin.inner is twin.again is twin.aside is not model.inner
    assert twin.inner.weight is model.inner.weight
    assert twin.listed[0] is not model.listed[0]
    assert twin.listed[1]["deep"][0] is not model.listed[1]["deep"][0]
    assert twin.method(None) == (twin, None)
    assert twin.bound() == (twin, twin.inner)
    assert twin.count is model.count
    twin.listed.append(3), twin.recent.append(2), twin.kept.append(2)
    twin.inner.register_forward_hook(lambda *_: None)
    twin.train(False), twin.register_buffer("more", torch.ones(1))
    assert (len(model.listed), list(model.recent), model.kept) == (2, [1], [1])
    assert model.training
    assert not model.inner._forward_hooks
    assert "more" not in model._buffers
    assert dict(model.config) == {"sides": [1, 2], "name": "frozen"}


def test_a_replica_may_have_buffers_of_its_own():
    model = Holder()
    twin = replica(model, own_buffers=True)
    twin.count += 1
    assert (float(model.count), float(twin.count)) == (0, 1)


def test_kept_activations_are_copied_without_their_history():
    model = nn.Linear(2, 2)
    model.kept = {"seen": [model(torch.ones(1, 2))], "one": model.weight * 2}
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    twin = independent(model)
    assert torch.equal(twin.kept["seen"][0], model.kept["seen"][0].detach())
    assert twin.kept["one"].is_leaf
    assert twin.weight is not model.weight
    assert model.kept["one"].grad_fn is not None


def holding_a_frozen_dict(model):
    model.config = Frozen(dim=24, sides=[4, 4])
    return model


def run_before_with_gradients(model):
    def keep(module, args, output):
        module.results = [output]

    model.register_forward_hook(keep)
    model(images("timm_vit", 1))
    return model


def pruned(model):
    prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    return model


def weight_normed(model):
    torch.nn.utils.weight_norm(model.blocks[1].attn.proj)
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("change", [holding_a_frozen_dict, run_before_with_gradients, pruned, weight_normed])
def test_models_convert_whatever_they_hold(change, inplace):
    model = change(small_model("timm_vit"))
    batch = images("timm_vit")
    with torch.no_grad():
        expected = model(batch)
    before, donor = values_of(model), independent(model)
    attnrewrite.explain(model, batch[:1])
    attnrewrite.plan(model, "neighborhood", batch[:1])
    assert_untouched(model, before)
    converted = attnrewrite.convert(model, "identity", batch[:1], inplace=inplace, progress=False)
    with torch.no_grad():
        assert float((converted(batch) - expected).abs().max() / expected.abs().max()) < 1e-12
    assert set(weights_of(converted)) == set(donor.state_dict())
    assert_same_gradients(gradients(converted, batch), gradients(donor, batch))
    if inplace:
        attnrewrite.revert(model)
        assert type(model) is type(donor)


def test_modes_that_return_nothing():
    """As LeViT's, whose ``train`` drops a cache."""

    class Model(Counting):
        def train(self, mode=True):
            super().train(mode)

    model, batch = Model(), torch.randn(2, 3, 32, 32)
    model.eval()
    expected = model(batch)
    converted = attnrewrite.convert(model, "identity", batch, progress=False)
    assert float((converted(batch) - expected).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("bases", [(ABC, Counting), (Counting, ABC), (Generic[Item], Counting), (Slotted, Counting)])
def test_classes_of_any_layout_are_rewritten(bases):
    class Model(*bases):
        pass

    model, batch = Model().eval(), torch.randn(2, 3, 32, 32)
    expected = model(batch)
    converted = attnrewrite.convert(model, "identity", batch, progress=False)
    assert isinstance(converted, Model)
    assert float((converted(batch) - expected).detach().abs().max()) < 1e-5
    again = copy.deepcopy(converted)
    assert type(again) is type(converted)
    assert type(attnrewrite.revert(converted)) is Model


def test_random_numbers_go_on_as_if_nothing_had_happened():
    model, batch = small_model("timm_vit"), images("timm_vit", 1)
    for look in (
        lambda: attnrewrite.explain(model, batch),
        lambda: attnrewrite.plan(model, "manhattan", batch),
        lambda: attnrewrite.analyze(model, batch, to="aggregated"),
    ):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        look()
        assert torch.equal(torch.rand(4), expected)


def test_new_weights_are_drawn_from_the_callers_seed():
    model, batch = small_model("timm_vit").float(), images("timm_vit", 1, torch.float32)

    def drawn(seed):
        torch.manual_seed(seed)
        converted = attnrewrite.convert(model, "tokens_to_token", batch, mode="fresh", fidelity="fresh", progress=False)
        old = {id(p) for p in model.parameters()}
        shapes = {name: p for name, p in converted.named_parameters() if id(p) not in old and "attnrewrite" in name}
        return torch.cat([p.detach().flatten() for p in shapes.values()])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
