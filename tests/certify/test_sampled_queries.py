"""Where queries are many a sample of them is certified: the certificate says so, and faults are still caught."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
import torch
from lifted_models import Lifted
from random_weights import perturbed
from test_operand_faults import FAULTS, vit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnrewrite
from attnrewrite.certify.query_rows import SAMPLE, sample_of
from attnrewrite.ir.sites import AttentionSite


def explicit(model: nn.Module) -> nn.Module:
    """Scores, softmax and mixing one by one."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.fixture(scope="module", params=["fused", "explicit"])
def many(request: pytest.FixtureRequest) -> Lifted:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(288, 512), depth=1, embed_dim=32, num_heads=4)
    made = explicit(model) if request.param == "explicit" else model
    return Lifted(perturbed(made), torch.randn(2, 3, 288, 512))


@pytest.fixture(scope="module", params=["fused", "explicit"])
def wide(request: pytest.FixtureRequest) -> Lifted:
    """Shifted windows of 24 x 24 on a map of 48 x 72, masked at the border, with a bias of their own."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(192, 288), window_size=24, embed_dim=16, depths=(2,), num_heads=(2,)
    )
    made = explicit(model) if request.param == "explicit" else model
    return Lifted(perturbed(made), torch.randn(1, 3, 192, 288))


def test_a_certificate_says_which_part_of_the_queries_it_is_of(many: Lifted) -> None:
    certificate = many.certificate(many.attention)
    assert certificate.passed
    assert re.fullmatch(r"certified \de-\d\d on 64 of 577 queries", str(certificate))


def test_where_queries_are_few_a_certificate_is_of_all() -> None:
    few = vit()
    assert "queries" not in str(few.certificate(few.attention))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_operands_is_not_certified(many: Lifted, name: str) -> None:
    assert not many.certificate(FAULTS[name](many.attention)).passed


def test_windows_are_sampled_with_their_mask_and_bias(wide: Lifted) -> None:
    for site in (site for site in wide.sites if isinstance(site, AttentionSite)):
        certificate = wide.certificate(site)
        assert certificate.passed, certificate
        assert str(certificate).endswith("on 64 of 576 queries")
        assert not wide.certificate(replace(site, bias=None)).passed
        flipped = replace(site.bias, values=site.bias.values.transpose(1, 2))
        assert not wide.certificate(replace(site, bias=flipped)).passed


@pytest.mark.parametrize("shift", [(0, 0), (12, 0), (11, 12)])
def test_a_wrong_shift_of_sampled_windows_is_not_certified(wide: Lifted, shift: tuple[int, int]) -> None:
    site = wide.first(AttentionSite, lambda s: s.keys.shift == (12, 12))
    assert not wide.certificate(replace(site, keys=replace(site.keys, shift=shift))).passed


@pytest.mark.parametrize("place", [0, -1])
def test_the_first_and_the_last_query_are_always_looked_at(wide: Lifted, place: int) -> None:
    site = wide.attention
    values = site.bias.values.clone()
    values[0, place, 7] += 1.0
    assert not wide.certificate(replace(site, bias=replace(site.bias, values=values))).passed


def test_a_sample_is_the_same_every_time_and_has_every_place_once() -> None:
    torch.manual_seed(1)
    first = sample_of(4097)
    torch.manual_seed(2)
    assert torch.equal(first, sample_of(4097))
    assert len(first.unique()) == SAMPLE
    assert (int(first[0]), int(first[-1])) == (0, 4096)


class Watch(TorchDispatchMode):
    """The largest float64 tensor that is made, and every operator that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operators = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
            image = real and leaf.shape[1:2] == (3,)  # those of other looks are as large as that, with fewer tokens
            if real and not image and leaf.dtype == torch.float64:
                self.largest = max(self.largest, leaf.numel())
                self.operators.add(func._schema.name)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_as_large_as_queries_by_keys_in_float64(dtype: torch.dtype) -> None:
    """At 4096 tokens, in the plan of a lossy conversion with all that it certifies and measures.

    A float64 model attends in float64 itself, in one fused operator.
    """
    model = timm.create_model("vit_tiny_patch16_224", img_size=1024, depth=1, embed_dim=16, num_heads=2).to(dtype)
    with Watch() as watch:
        made = attnrewrite.plan(model.eval(), "neighborhood", torch.randn(1, 3, 1024, 1024, dtype=dtype))
    (planned,) = made.converting
    assert "on 64 of 4097 queries" in str(planned.certificate)
    assert watch.operators, "nothing was certified in float64"
    assert watch.largest < 4096 * 4096 / 4
    assert planned.measured["error"] > 0


def test_float64_attention_is_certified_by_its_formula() -> None:
    """Not by the fused kernel of CPUs, which is good to some 3e-7 only."""
    lifted = vit()
    with Watch() as watch:
        assert lifted.certificate(lifted.attention).random < 1e-12
    assert "aten::_softmax" in watch.operators or "aten::_safe_softmax" in watch.operators
    assert not any("flash" in name for name in watch.operators)
