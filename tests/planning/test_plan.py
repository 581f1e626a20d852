"""A plan changes nothing and can be printed, narrowed, limited and applied."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.patterns.targets.neighborhood import Neighborhood
from model_queries import ATTENTION, converted_sites, fates, rewritten_names, run
from small_models import difference, images, logits, small_model
from untouched import Counting, assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "identity"),
        ("timm_swin", "neighborhood"),
        pytest.param("torchvision_vit", "identity", marks=pytest.mark.slow),
        ("transformers_swin", "identity"),
    ],
)
def test_a_plan_leaves_the_model_untouched(name, to):
    model = small_model(name).train()
    next(model.children()).eval()
    logits(model(images(name))).sum().backward()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda module, arguments, output: None)
    before, random = values_of(model), torch.get_rng_state()
    attnrewrite.plan(model, to, images(name, 1))
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plan_undoes_what_forward_writes():
    model = Counting().train()
    before = values_of(model)
    plan = attnrewrite.plan(model, "neighborhood", torch.randn(2, 3, 64, 64), kernel_size=3)
    assert_untouched(model, before)
    assert float(model.calls) == 0.0
    assert model.seen == []
    assert [planned.status for planned in plan.sites if planned.site.kind == "attention"] == ["convert"], plan


def test_a_plan_leaves_global_settings():
    before = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    attnrewrite.plan(small_model("torchvision_vit"), "identity", images("torchvision_vit", 1))
    after = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    assert after == before


@pytest.mark.parametrize("grad", [True, False])
def test_planning_works_with_and_without_grad_mode(model, batch, grad):
    with torch.set_grad_enabled(grad):
        converted = attnrewrite.convert(model, "identity", batch)
        assert torch.is_grad_enabled() == grad
    converted(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


def test_convert_of_a_copy_leaves_the_model_untouched(model, batch):
    before, random = values_of(model), torch.get_rng_state()
    attnrewrite.convert(model, "neighborhood", batch, kernel_size=3)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plan_prints_a_line_for_every_site(vit, batch):
    plan = attnrewrite.plan(vit, "neighborhood", batch, kernel_size=3)
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.sites)
    for name in ATTENTION:
        (line,) = [line for line in lines if name in line]
        assert "grid 4x4+1" in line
        assert "certified" in line
        assert "neighborhood PROJECTED" in line
    assert not any("neighborhood" in line for line in lines if "mlp" in line)


def test_a_plan_states_each_kind_once(vit, batch):
    plan = attnrewrite.plan(vit, "identity", batch)
    assert set(fates(plan).values()) == {"convert"}
    assert [planned.site.kind for planned in plan.sites].count("attention") == 2


def test_drop_leaves_a_site_alone(vit, batch):
    whole = attnrewrite.plan(vit, "identity", batch)
    plan = whole.drop("blocks.1.*")
    assert set(fates(whole).values()) == {"convert"}
    assert fates(plan)["blocks.1.attn"] == fates(plan)["blocks.1.mlp"] == "kept"
    converted = plan.apply()
    assert not any(name.startswith("blocks.1") for name in rewritten_names(converted))
    assert any(name.startswith("blocks.0") for name in rewritten_names(converted))
    assert "dropped" in str(attnrewrite.report(converted))


def test_drop_takes_several_globs(vit, batch):
    plan = attnrewrite.plan(vit, "identity", batch).drop("blocks.0.*", "*.mlp", "patch*")
    assert converted_sites(plan.apply()) == ["blocks.1.attn"]


def test_drop_of_nothing_names_the_nearest(vit, batch):
    plan = attnrewrite.plan(vit, "identity", batch)
    with pytest.raises(ArgumentError, match=r"drop: 'block\.0\.attn' matches no site; did you mean 'blocks\.0\.attn'"):
        plan.drop("block.0.attn")
    assert set(fates(plan).values()) == {"convert"}


def test_limits_convert_the_first_sites_only(vit, batch):
    count = 1
    plan = attnrewrite.plan(vit, "neighborhood", batch, kernel_size=3).limit(count)
    limited = plan.apply()
    assert converted_sites(limited) == ATTENTION[:count]
    chosen = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, sites=ATTENTION[:count])
    bounded = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, max_rewrites=count)
    assert torch.equal(run(limited, batch), run(chosen, batch))
    assert torch.equal(run(bounded, batch), run(chosen, batch))


def test_limits_bisect_to_the_rewrite_that_changes_the_output(batch):
    vit = small_model("timm_vit", depth=3)  # after the last block only the class token is read
    targets = {"blocks.1.attn": Neighborhood(kernel_size=1), "*": "identity"}
    errors = []
    for count in range(1, 3):
        converted = attnrewrite.convert(vit, targets, batch, max_rewrites=count)
        errors.append(difference(run(converted, batch), run(vit, batch)))
    assert errors[0] < 1e-12
    assert errors[1] > 1e-4


def test_a_negative_limit_is_refused(vit, batch):
    plan = attnrewrite.plan(vit, "identity", batch)
    with pytest.raises(ArgumentError, match=r"max_rewrites: must not be negative, got -1"):
        plan.limit(-1)
    with pytest.raises(ArgumentError, match=r"max_rewrites: must not be negative, got -2"):
        attnrewrite.convert(vit, "identity", batch, max_rewrites=-2)


def test_a_limit_of_zero_converts_nothing(vit, batch):
    with pytest.raises(ConversionError, match=r"(?s)nothing to convert in VisionTransformer.*max_rewrites=0"):
        attnrewrite.convert(vit, "identity", batch, max_rewrites=0)


def test_a_plan_can_be_applied_several_times(vit, batch):
    plan = attnrewrite.plan(vit, "neighborhood", batch, kernel_size=3)
    first, second = plan.apply(), plan.apply()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert difference(run(second, batch), run(plan.apply(), batch)) == 0.0
    cores = [child for child in second.modules() if type(child).__module__.startswith("attnrewrite.cores")]
    assert cores
    assert not {map(id, cores)} & {id(child) for child in first.modules()}


def test_a_plan_applied_after_another_checkpoint_uses_it(model, batch):
    plan = attnrewrite.plan(model, "identity", batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert difference(run(plan.apply(), batch), run(model, batch)) < 1e-12


def test_a_plan_applied_in_place_cannot_be_applied_again(model, batch):
    plan = attnrewrite.plan(model, "identity", batch)
    plan.apply(inplace=True)
    expected = run(model, batch)
    with pytest.raises(ConversionError, match=r"blocks\.0\.attn was rewritten since the plan was made; revert"):
        plan.apply(inplace=True)
    assert torch.equal(run(model, batch), expected)
    attnrewrite.revert(model)
    assert rewritten_names(model) == []
    assert all(not type(child).__name__.startswith("Rewritten") for child in model.modules())
