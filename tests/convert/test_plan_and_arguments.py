"""Plans, the arguments of convert, reports, revert, and what is said when something is wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from attnrewrite.patterns.identity import Identity
from attnrewrite.patterns.neighborhood import Neighborhood
from small_models import difference, images, logits, small_model, timm_vit
from torch import nn

import attnrewrite
from attnrewrite import AttnRewriteError
from attnrewrite.errors import ArgumentError, CaptureError, ConversionError
from attnrewrite.report import ConversionReport, SiteReport
from attnrewrite.targets import Conversion, Exactness, Target

ATTENTION = ["blocks.0.attn", "blocks.1.attn"]


@pytest.fixture(scope="module")
def vit():
    """Two blocks, never changed by a test."""
    return small_model("timm_vit")


@pytest.fixture(scope="module")
def batch():
    return images("timm_vit")


@pytest.fixture
def model(vit):
    return copy.deepcopy(vit)


@pytest.fixture(scope="module")
def exact(vit, batch):
    return attnrewrite.convert(vit, "identity", batch)


@pytest.fixture(scope="module")
def projected(vit, batch):
    return attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3)


@torch.no_grad()
def run(module, batch):
    return logits(module(batch))


def rewritten(module):
    return sorted(name for name, child in module.named_modules() if hasattr(child, "attnrewrite_rewriting"))


def converted_sites(module):
    return [site.name for site in attnrewrite.report(module).converted]


def fates(plan):
    return {planned.site.name: planned.status for planned in plan.sites}


def values_of(module):
    """Everything a call could leave behind, in a form that can be compared."""
    plain = {}
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                plain[name, key] = {inner: id(held) for inner, held in value.items()}
            elif key.endswith("_hooks") or "hooks_" in key:
                plain[name, key] = len(value) if hasattr(value, "__len__") else value
            else:
                plain[name, key] = repr(value)
        plain[name, "class"] = type(child)
    tensors = {name: value.clone() for name, value in (*module.state_dict().items(), *module.named_buffers())}
    gradients = {name: (id(p.grad), p.requires_grad, p._version) for name, p in module.named_parameters()}
    return plain, tensors, gradients


def assert_untouched(module, before):
    plain, tensors, gradients = values_of(module)
    assert plain == before[0]
    assert gradients == before[2]
    assert list(tensors) == list(before[1])
    for name, value in before[1].items():
        assert torch.equal(tensors[name], value), name


class Counting(nn.Module):
    """Attention that writes to itself: a buffer, an attribute and a list, in every forward; with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.batch_norm = nn.BatchNorm2d(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.size = [], None

    def forward(self, x):
        self.calls += 1
        x = self.batch_norm(self.stem(x))
        self.size = tuple(x.shape[-2:])
        self.seen.append(self.size)
        x = x.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = ((query @ key.transpose(-2, -1)) / 8**0.5).softmax(-1) @ value
        return self.proj(x.transpose(1, 2).flatten(2)).mean(1)


# --- a plan changes nothing


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
    assert any(planned.status == "convert" for planned in plan.sites) or plan.refused


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


# --- a plan is data


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
    plan = attnrewrite.plan(vit, "identity", batch)
    assert plan.drop("blocks.1.*") is plan
    assert fates(plan)["blocks.1.attn"] == fates(plan)["blocks.1.mlp"] == "kept"
    converted = plan.apply()
    assert not any(name.startswith("blocks.1") for name in rewritten(converted))
    assert any(name.startswith("blocks.0") for name in rewritten(converted))
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
    cores = [child for child in second.modules() if type(child).__module__.startswith("attnrewrite.modules")]
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
    try:
        again = plan.apply(inplace=True)
    except AttnRewriteError:
        again = model
    assert torch.equal(run(again, batch), expected)
    attnrewrite.revert(model)
    assert rewritten(model) == []
    assert all(not type(child).__name__.startswith("Rewritten") for child in model.modules())


# --- targets


def test_a_mapping_gives_every_site_its_target(vit, batch):
    targets = {"blocks.0.*": "identity", "blocks.1.attn": Neighborhood(kernel_size=3)}
    report = attnrewrite.report(attnrewrite.convert(vit, targets, batch))
    chosen = {site.name: (site.target, site.exactness) for site in report.converted}
    assert chosen == {
        "blocks.0.attn": ("identity", "EXACT"),
        "blocks.0.mlp": ("identity", "EXACT"),
        "blocks.1.attn": ("neighborhood", "PROJECTED"),
    }


def test_the_first_match_of_a_mapping_wins(vit, batch):
    given = {"*.1.*": Neighborhood(kernel_size=3), "*": "identity"}
    report = attnrewrite.report(attnrewrite.convert(vit, given, batch))
    targets = {site.name: site.target for site in report.converted if site.kind == "attention"}
    assert targets == {"blocks.0.attn": "identity", "blocks.1.attn": "neighborhood"}


def test_a_target_object_equals_its_name_with_options(vit, batch, projected):
    converted = attnrewrite.convert(vit, Neighborhood(kernel_size=3), batch)
    assert torch.equal(run(converted, batch), run(projected, batch))


def test_options_reach_the_target(vit, batch):
    report = attnrewrite.report(attnrewrite.convert(vit, "neighborhood", batch, kernel_size=(1, 2), dilation=2))
    assert report.converted[0].settings == {"kernel_size": (1, 2), "dilation": (2, 2)}


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ({}, {}, r"to: the mapping is empty"),
        ({"*": "neighborhood"}, {"kernel_size": 3}, r"to: options \['kernel_size'\] belong into the mapping's target"),
        ({"block.0.attn": "identity"}, {}, r"to: 'block\.0\.attn' matches no site; did you mean 'blocks\.0\.attn'"),
        ({"*": "neighbourhood"}, {}, r"to: unknown target 'neighbourhood'; did you mean 'neighborhood'"),
        (Neighborhood(3), {"kernel_size": 5}, r"to: options \['kernel_size'\] go into the target object"),
        ("neighbourhood", {}, r"to: unknown target 'neighbourhood'; did you mean 'neighborhood'\?"),
        ("xyz", {}, r"to: unknown target 'xyz'.*Known targets: .*identity.*neighborhood"),
        (3, {}, r"to: unknown target 3"),
        (Neighborhood, {}, r"to: "),
        ("neighborhood", {"kernel_sz": 3}, r"to: .* does not take \['kernel_sz'\]; it takes: kernel_size"),
        ("identity", {"kernel_size": 3}, r"to: target 'identity' does not take \['kernel_size'\]"),
        ("neighborhood", {"kernel_size": 0}, r"kernel_size: .*at least 1.* got (\(0, )?0"),
        ("neighborhood", {"kernel_size": (3, -1)}, r"kernel_size: .*at least 1.* got \(3, -1\)"),
        ("neighborhood", {"dilation": 0}, r"dilation: .*at least 1"),
        ("neighborhood", {"oversize": "shrink"}, r"oversize: expected 'clamp' or 'error', got 'shrink'"),
        ("dilated_neighborhood", {"kernel_size": 0}, r"kernel_size: .*at least 1"),
        ("dilated_neighborhood", {"dilation": -1}, r"dilation: .*at least 1"),
        ("dilated_neighborhood", {"oversize": "shrink"}, r"oversize: expected 'clamp' or 'error'"),
        ("neighborhood", {"kernel_size": "3"}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": 2.5}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": (3,)}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": (3, 3, 3)}, r"kernel_size: "),
        ("neighborhood", {"dilation": None}, r"dilation: "),
    ],
)
def test_targets_without_meaning_are_refused(vit, batch, to, options, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(vit, to, batch, **options)


# --- sites, keep, fidelity, strict


@pytest.mark.parametrize(
    "sites",
    ["blocks.1.*", ["blocks.1.attn"], {"*.1.a*"}, lambda site: ".1." in site.name],
    ids=["glob", "list", "set", "predicate"],
)
def test_sites_choose_what_is_converted(vit, batch, sites):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, sites=sites)
    assert converted_sites(converted) == rewritten(converted) == ["blocks.1.attn"]
    left = {s.name: s for s in attnrewrite.report(converted).sites}
    assert left["blocks.0.attn"].status == "kept"
    assert left["blocks.0.attn"].why == "not in sites"


@pytest.mark.parametrize(
    "keep",
    ["*.1.*", ["blocks.1.attn", "blocks.1.mlp"], lambda site: site.name.startswith("blocks.1.")],
    ids=["glob", "list", "predicate"],
)
def test_keep_chooses_what_is_left_alone(vit, batch, keep):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, keep=keep)
    assert converted_sites(converted) == ["blocks.0.attn"]
    assert {s.name: s.why for s in attnrewrite.report(converted).sites}["blocks.1.attn"] == "keep"


def test_keep_wins_over_sites(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, sites="*.attn", keep="blocks.0.*")
    assert converted_sites(converted) == ATTENTION[1:]


def test_a_predicate_is_given_the_site(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, sites=lambda site: site.kind == "mlp")
    assert {site.kind for site in attnrewrite.report(converted).converted} == {"mlp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": "blocks.9.attn"}, r"sites: 'blocks\.9\.attn' matches no site; did you mean 'blocks\.\d\.attn'"),
        ({"keep": ["blocks.0.attn", "layers.*"]}, r"keep: 'layers\.\*' matches no site"),
        ({"keep": "auto"}, r'keep: "auto" is not available yet; name the sites'),
        ({"sites": 3}, r"sites: "),
        ({"keep": [3]}, r"keep: "),
        ({"fidelity": "exactly"}, r"fidelity: expected one of fresh, projected, continuous, exact, got 'exactly'"),
        ({"fidelity": 3}, r"fidelity: expected one of"),
        ({"calibrate": [1]}, r"calibrate: .*not available"),
        ({"max_rewrites": "two"}, r"max_rewrites: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_selections_without_meaning_are_refused(vit, batch, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(vit, "identity", batch, **arguments)


def test_no_sites_are_nothing_to_convert(vit, batch):
    with pytest.raises(ConversionError, match=r"(?s)nothing to convert.*not in sites"):
        attnrewrite.convert(vit, "identity", batch, sites=[])


def test_fidelity_exact_leaves_lossy_conversions_alone(vit, batch):
    plan = attnrewrite.plan(vit, {"blocks.0.attn": Neighborhood(3), "*": "identity"}, batch, fidelity="exact")
    assert fates(plan)["blocks.0.attn"] == "kept"
    assert fates(plan)["blocks.1.attn"] == "convert"
    (why,) = [planned.why for planned in plan.sites if planned.site.name == "blocks.0.attn"]
    assert "PROJECTED is below fidelity='exact'" in why
    assert difference(run(plan.apply(), batch), run(vit, batch)) < 1e-12


@pytest.mark.parametrize("fidelity", ["exact", "continuous"])
def test_nothing_above_the_fidelity_is_an_error(vit, batch, fidelity):
    with pytest.raises(ConversionError, match=rf"(?s)nothing to convert.*blocks\.0\.attn.*below fidelity='{fidelity}'"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, fidelity=fidelity)


@pytest.mark.parametrize("fidelity", ["projected", "fresh"])
def test_lower_fidelity_accepts_lossy_conversions(vit, batch, fidelity, projected):
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, fidelity=fidelity)
    assert converted_sites(converted) == converted_sites(projected)


def test_strict_names_every_site_that_is_left(vit, batch):
    targets = {"blocks.0.attn": Neighborhood(3), "*": "identity"}
    with pytest.raises(ConversionError, match=r"(?s)strict: 1 sites of VisionTransformer.*blocks\.0\.attn: PROJECTED"):
        attnrewrite.convert(vit, targets, batch, fidelity="exact", strict=True)


def test_strict_does_not_mind_what_was_kept_on_request(vit, batch):
    converted = attnrewrite.convert(vit, "identity", batch, keep="blocks.0.*", strict=True)
    assert not any(name.startswith("blocks.0") for name in converted_sites(converted))


def test_strict_leaves_the_model_untouched(model, batch):
    before = values_of(model)
    with pytest.raises(ConversionError):
        attnrewrite.convert(model, "neighborhood", batch, kernel_size=9, oversize="error", strict=True, inplace=True)
    assert_untouched(model, before)


# --- inplace, return_report, revert, converting twice


def test_inplace_returns_the_model_itself(model, vit, batch):
    assert attnrewrite.convert(model, "identity", batch, inplace=True) is model
    assert rewritten(model)
    assert difference(run(model, batch), run(vit, batch)) < 1e-12


def test_return_report_is_the_report_of_the_model(vit, batch):
    converted, report = attnrewrite.convert(vit, "identity", batch, return_report=True)
    assert isinstance(report, ConversionReport)
    assert attnrewrite.report(converted) is report


def test_a_model_that_was_not_converted_has_no_report(vit):
    with pytest.raises(ArgumentError, match=r"model: VisionTransformer was not made by attnrewrite\.convert"):
        attnrewrite.report(vit)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        pytest.param("timm_swin", "identity", marks=pytest.mark.slow),
        ("torchvision_vit", "identity"),
        ("transformers_swin", "identity"),
    ],
)
def test_revert_restores_everything(name, to):
    model = small_model(name)
    before, expected = values_of(model), run(copy.deepcopy(model), images(name))
    attnrewrite.convert(model, to, images(name, 1), inplace=True)
    assert rewritten(model)
    assert attnrewrite.revert(model) is model
    assert_untouched(model, before)
    assert torch.equal(run(model, images(name)), expected)


def test_revert_keeps_what_was_trained(projected, batch, vit):
    converted = copy.deepcopy(projected)
    with torch.no_grad():
        converted.blocks[0].attn.qkv.weight.mul_(2)
    reverted = attnrewrite.revert(converted)
    expected = copy.deepcopy(vit)
    with torch.no_grad():
        expected.blocks[0].attn.qkv.weight.mul_(2)
    assert torch.equal(run(reverted, batch), run(expected, batch))


def test_revert_of_an_unconverted_model_is_refused(vit):
    with pytest.raises(ArgumentError, match=r"model: nothing in VisionTransformer was rewritten"):
        attnrewrite.revert(vit)


def test_a_reverted_model_has_no_report_and_converts_again(projected, batch):
    reverted = attnrewrite.revert(copy.deepcopy(projected))
    with pytest.raises(ArgumentError):
        attnrewrite.report(reverted)
    again = attnrewrite.convert(reverted, "neighborhood", batch, kernel_size=3)
    assert torch.equal(run(again, batch), run(projected, batch))


@pytest.mark.parametrize(
    ("name", "inplace"),
    [("timm_vit", False), ("timm_swin", True), pytest.param("transformers_vit", True, marks=pytest.mark.slow)],
)
def test_converting_twice_is_right_or_refused(name, inplace):
    donor = small_model(name)
    once = attnrewrite.convert(donor, "identity", images(name, 1))
    try:
        twice = attnrewrite.convert(once, "identity", images(name, 1), inplace=inplace)
    except AttnRewriteError:
        twice = once
    assert difference(run(twice, images(name)), run(donor, images(name))) < 1e-12
    assert list(twice.state_dict()) == list(donor.state_dict())
    reverted = attnrewrite.revert(twice)
    assert {n: type(m) for n, m in reverted.named_modules()} == {n: type(m) for n, m in donor.named_modules()}
    assert torch.equal(run(reverted, images(name)), run(donor, images(name)))


def test_a_second_target_for_other_sites_composes(vit, batch):
    first = attnrewrite.convert(vit, "identity", batch, sites="blocks.0.*")
    second = attnrewrite.convert(first, "neighborhood", batch, kernel_size=3, sites="blocks.1.attn")
    direct = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, sites="blocks.1.attn")
    assert difference(run(second, batch), run(direct, batch)) < 1e-12
    assert {"blocks.0.attn", "blocks.1.attn"} <= set(rewritten(second))


# --- failures leave the model as it was


class Wrong(nn.Module):
    def forward(self, query, key, value, bias=None):
        return 2 * value


class Raising(nn.Module):
    def forward(self, query, key, value, bias=None):
        raise ValueError("no kernel for this")


class Lying(Target):
    """Says that it keeps the function, and does not."""

    name = "lying"

    def __init__(self, core):
        self.core = core

    def convert(self, site, index):
        return Conversion(Exactness.EXACT, "it says", self.core())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_conversion_that_is_not_what_it_says_is_caught(model, batch, inplace):
    before = values_of(model)
    with pytest.raises(ConversionError, match=r"VisionTransformer differs from the original by .*max_rewrites"):
        attnrewrite.convert(model, Lying(Wrong), batch, inplace=inplace)
    assert_untouched(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_core_that_fails_leaves_the_model_untouched(model, batch, inplace):
    before = values_of(model)
    with pytest.raises(Exception, match="no kernel for this"):
        attnrewrite.convert(model, Lying(Raising), batch, inplace=inplace)
    assert_untouched(model, before)


def test_a_lie_beside_a_lossy_conversion_is_caught(model, batch):
    """End to end nothing can be expected of a lossy conversion: the exact ones must be checked one by one."""
    with pytest.raises(ConversionError):
        attnrewrite.convert(model, {"blocks.0.attn": Neighborhood(3), "blocks.1.attn": Lying(Wrong)}, batch)


# --- the report


def test_the_report_measures_lossy_conversions(projected):
    report = attnrewrite.report(projected)
    assert report.output_error > 1e-6
    for site in report.converted:
        assert site.exactness == "PROJECTED"
        assert site.error > 1e-6
        assert len(site.dropped_mass) == 3
        assert all(0.0 < mass < 1.0 for mass in site.dropped_mass)
        assert "certified" in site.certificate
        assert "kernel 3" in site.why


def test_the_dropped_mass_is_that_of_the_softmax(vit, batch):
    """Against the attention weights of the original, in which all heads see 16 tokens and the class token."""
    converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=1, sites="blocks.0.attn")
    attention = vit.blocks[0].attn
    with torch.no_grad():
        tokens = vit.blocks[0].norm1(vit.norm_pre(vit._pos_embed(vit.patch_embed(batch))))
        query, key, _ = attention.qkv(tokens).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / 4).softmax(-1)
    seen = torch.eye(17, dtype=torch.bool)
    seen[0, :] = seen[:, 0] = True
    expected = (weights * ~seen).sum(-1).mean((0, 2))
    found = torch.tensor(attnrewrite.report(converted).converted[0].dropped_mass, dtype=torch.float64)
    assert float((found - expected).abs().max()) < 1e-5


def test_the_local_error_is_that_of_the_core(vit, batch):
    """A kernel that covers the map loses nothing; smaller ones lose more and more."""
    errors = []
    for kernel in (3, 1):
        converted = attnrewrite.convert(vit, "neighborhood", batch, kernel_size=kernel, sites="blocks.0.attn")
        errors.append(attnrewrite.report(converted).converted[0].error)
    assert 0 < errors[0] < errors[1]


def test_what_was_not_measured_is_never_zero(exact):
    report = attnrewrite.report(exact)
    assert all(site.error is None for site in report.converted)
    assert "not measured" in str(report)
    assert "| not measured |" in report.to_markdown()
    assert all(site["error"] is None for site in json.loads(report.to_json())["sites"])
    plain = ConversionReport("Model", [[1, 3, 8, 8]], [SiteReport("a.0.attn", "attention", "", "converted")])
    assert "output error not measured" in plain.headline()
    assert json.loads(plain.to_json())["output_error"] is None


def test_the_json_has_a_schema_version_and_the_sites(projected):
    data = json.loads(attnrewrite.report(projected).to_json())
    assert data["schema_version"] == 1
    assert data["model"] == "VisionTransformer"
    assert data["input_shapes"] == [[2, 3, 64, 64]]
    rows = {site["name"]: site for site in data["sites"]}
    assert rows["blocks.0.attn"]["settings"] == {"kernel_size": [3, 3], "dilation": [1, 1]}
    assert rows["blocks.0.mlp"]["status"] == "untouched"


def test_json_holds_no_nan():
    report = ConversionReport("Model", [], [SiteReport("a", "attention", "", "converted", error=float("nan"))])
    json.loads(report.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_alike_sites_share_a_row(exact):
    markdown = attnrewrite.report(exact).to_markdown()
    assert "| blocks.{0...1}.attn |" in markdown
    assert "| blocks.{0...1}.mlp |" in markdown
    assert "blocks.1.attn" not in markdown
    assert "blocks.{0...1}.attn" in str(attnrewrite.report(exact))


def test_folding_does_not_claim_sites_between_that_differ(batch):
    """blocks.0 and blocks.2 are not ``blocks.{0...2}`` if blocks.1 is another row."""
    converted = attnrewrite.convert(
        small_model("timm_vit", depth=3), "neighborhood", batch, kernel_size=3, keep="blocks.1.attn"
    )
    markdown = attnrewrite.report(converted).to_markdown()
    assert "{0...2}.attn" not in markdown
    for name in (*ATTENTION, "blocks.2.attn"):
        assert f"| {name} |" in markdown


def test_a_folded_row_shows_the_largest_error():
    sites = [
        SiteReport(f"blocks.{index}.attn", "attention", "s", "converted", "t", "PROJECTED", error=error)
        for index, error in enumerate([0.1, 0.3, 0.2])
    ]
    assert "3.0e-01" in ConversionReport("Model", [], sites).to_markdown()


def test_a_folded_row_does_not_hide_what_was_not_measured_or_is_nan():
    sites = [
        SiteReport(f"blocks.{index}.attn", "attention", "s", "converted", "t", "PROJECTED", error=error)
        for index, error in enumerate([0.1, float("nan"), 0.2])
    ]
    assert "nan" in ConversionReport("Model", [], sites).to_markdown()


def test_markdown_is_a_table_with_one_width(projected):
    rows = [line for line in attnrewrite.report(projected).to_markdown().splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "2 of" not in rows[0]


def test_text_with_brackets_is_not_taken_for_markup():
    site = SiteReport("a", "attention", "keys [bold]x[/bold]", "refused", why="its arguments[0] [/] differ")
    text = str(ConversionReport("Model", [], [site]))
    assert "[bold]x[/bold]" in text
    assert "arguments[0]" in text


def test_the_headline_counts(projected):
    assert "2 of 5 sites converted; output error" in attnrewrite.report(projected).headline()


def test_no_new_parameters_are_claimed_and_none_exist(projected, vit):
    assert attnrewrite.report(projected).new_parameters == []
    assert len(list(projected.parameters())) == len(list(vit.parameters()))


# --- what is said when something is wrong


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", None, 3, nn.Linear])
def test_not_a_module(model):
    with pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module, got (str|NoneType|int|type)"):
        attnrewrite.convert(model, "identity")


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("to", ["neighborhood", "identity"])
def test_a_model_without_attention(to):
    with pytest.raises(ConversionError, match=r"no (softmax )?attention.* in Sequential"):
        attnrewrite.convert(small_cnn(), to, torch.randn(1, 3, 32, 32))


def test_a_model_without_attention_but_with_a_strided_stem():
    stem = nn.Conv2d(3, 8, 4, stride=4)
    model = nn.Sequential(stem, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(ConversionError, match=r"no attention was found in Sequential"):
        attnrewrite.convert(model, "neighborhood", torch.randn(1, 3, 32, 32))


def test_a_kernel_that_does_not_fit(vit, batch):
    reason = r"kernel 9 .*does not fit the 4x4\+1 map; use kernel_size=\(4, 4\) or oversize='clamp'"
    with pytest.raises(ConversionError, match=rf"(?s)blocks\.0\.attn.*{reason}"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=9, oversize="error")


def test_a_clamped_kernel_is_reported(vit, batch):
    report = attnrewrite.report(attnrewrite.convert(vit, "neighborhood", batch, kernel_size=9))
    assert all("clamped from 9" in site.why for site in report.converted)


def test_a_dilation_that_does_not_fit(vit, batch):
    reason = r"kernel 3 with dilation 2 does not fit .*oversize='clamp'"
    with pytest.raises(ConversionError, match=rf"(?s)blocks\.0\.attn.*{reason}"):
        attnrewrite.convert(vit, "neighborhood", batch, kernel_size=3, dilation=2, oversize="error")


def filled(value):
    return torch.full((1, 3, 64, 64), value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.randn(1, 3, 60, 60, dtype=torch.float64), r"VisionTransformer does not run on them .*\[1, 3, 60, 60\]"),
        (torch.randn(1, 4, 64, 64, dtype=torch.float64), r"\[1, 4, 64, 64\].*pass the shape and dtype"),
        (torch.randn(3, 64, 64, dtype=torch.float64), r"\[3, 64, 64\].*pass the shape and dtype"),
        (torch.randn(1, 3, 64, 64), r"torch\.float32.*pass the shape and dtype"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.long), r"torch\.int64.*pass the shape and dtype"),
        (filled(float("nan")), r"contains NaN or infinite values; pass finite"),
        (filled(float("inf")), r"contains NaN or infinite values; pass finite"),
        ("image.png", r"expected a tensor, a tuple or a dict of tensors, got str; .*torch\.randn"),
        (64, r"expected a tensor, a tuple or a dict of tensors, got int"),
        ({"image": torch.randn(1, 3, 64, 64, dtype=torch.float64)}, r"VisionTransformer does not run on them"),
        ((), r"VisionTransformer does not run on them \(no tensor\)"),
        (torch.randn(0, 3, 64, 64, dtype=torch.float64), r""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_example_inputs(model, example, message):
    before = values_of(model)
    with pytest.raises(ArgumentError, match=rf"(?s)example_inputs: .*{message}"):
        attnrewrite.convert(model, "identity", example, inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("spell", [lambda x: [x], lambda x: {"x": x}], ids=["list", "dict"])
def test_spellings_of_example_inputs(vit, batch, exact, spell):
    converted = attnrewrite.convert(vit, "identity", spell(batch))
    assert torch.equal(run(converted, batch), run(exact, batch))


def test_example_inputs_are_derived_from_the_model(vit, batch, exact):
    converted = attnrewrite.convert(vit, "identity")
    assert attnrewrite.report(converted).input_shapes == [[1, 3, 64, 64]]
    assert torch.equal(run(converted, batch), run(exact, batch))


def test_a_model_that_states_no_size_is_asked_for():
    with pytest.raises(ArgumentError, match=r"example_inputs: Counting does not say which image size.*torch\.randn"):
        attnrewrite.convert(Counting(), "identity")


def test_example_inputs_are_not_changed(vit):
    example = images("timm_vit")
    before = example.clone()
    attnrewrite.convert(vit, "identity", example)
    assert torch.equal(example, before)
    assert not example.requires_grad


@pytest.mark.parametrize(
    ("where", "poison"),
    [
        ("blocks.1.attn.qkv.weight", float("nan")),
        ("blocks.1.attn.proj.bias", float("inf")),
        ("blocks.1.mlp.fc1.weight", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_never_certified(model, batch, where, poison):
    model.get_parameter(where).data.view(-1)[0] = poison
    plan = attnrewrite.plan(model, "identity", batch)
    site = where.rpartition(".")[0].rpartition(".")[0]
    refused = {planned.site.name for planned in plan.sites if planned.status == "refused"}
    assert site in refused
    assert "blocks.1.mlp" in refused  # what it is given is not finite
    assert not any(planned.certificate.passed for planned in plan.sites if planned.site.name in refused)
    assert fates(plan)["blocks.0.attn"] == "convert"


def test_weights_that_are_not_finite_leave_the_model_untouched(model, batch):
    model.blocks[0].attn.qkv.weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttnRewriteError, match=r"(?i)nan|not certified|differs"):
        attnrewrite.convert(model, "identity", batch, inplace=True)
    assert rewritten(model) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


class Branching(nn.Module):
    """Does something else for bright images, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.body = timm_vit()

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


def test_a_model_that_cannot_be_exported():
    model = Branching().eval()
    example = torch.randn(1, 3, 64, 64)
    with pytest.raises(Exception) as original:  # noqa: PT011
        torch.export.export(model, (example,), strict=False)
    first = next(line.strip() for line in str(original.value).splitlines() if line.strip())
    before = values_of(model)
    with pytest.raises(CaptureError) as refused:
        attnrewrite.convert(model, "identity", example, inplace=True)
    assert "Branching cannot be exported" in str(refused.value)
    assert first[:40] in str(refused.value)
    assert "data-dependent control flow" in str(refused.value)
    assert refused.value.__cause__ is not None
    assert_untouched(model, before)


def test_the_submodule_that_can_be_exported_converts_as_is_advised():
    model = Branching().eval()
    attnrewrite.convert(model.body, "identity", torch.randn(1, 3, 64, 64), inplace=True)
    assert rewritten(model)
    assert run(model, torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_errors_have_the_base_class_and_a_builtin_one():
    for kind, builtin in ((ArgumentError, ValueError), (CaptureError, RuntimeError), (ConversionError, RuntimeError)):
        assert issubclass(kind, AttnRewriteError)
        assert issubclass(kind, builtin)


def test_the_identity_target_covers_what_it_says(exact):
    assert {site.kind for site in attnrewrite.report(exact).converted} == set(Identity.kinds)
