"""What a model can do and what refers to it must survive its conversion."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from small_models import (
    BUILDERS,
    DTYPE,
    TOLERANCE,
    assert_same_gradients,
    difference,
    gradients,
    images,
    logits,
    small_model,
    timm_pvt,
)
from torch import nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from transformers.modeling_outputs import BaseModelOutput

import attnrewrite
from attnrewrite import AttnRewriteError

ROOT = Path(__file__).resolve().parent.parent.parent
VITS = [name for name in BUILDERS if "vit" in name]
SWINS = [name for name in BUILDERS if "swin" in name]
CONVERSIONS = [(name, "identity") for name in BUILDERS]
CONVERSIONS += [(name, "neighborhood") for name in BUILDERS if not name.endswith(("unfused", "eager"))]


def converted_from(donor, name, to, example=None, **options):
    """Attention of whole maps becomes a kernel of 3, windows stay what they are; other sites become our own modules."""
    if to == "neighborhood" and name in VITS:
        options = {"kernel_size": 3} | options
    example = images(name, 1, next(donor.parameters()).dtype) if example is None else example
    return attnrewrite.convert(donor, to, example, **options)


class Pair:
    """A donor, what it became, and a batch for both. Tests change copies only."""

    def __init__(self, name, to):
        self.name, self.to = name, to
        self.donor = small_model(name)
        self.converted = converted_from(self.donor, name, to)
        self.batch = images(name)
        self.same_function = to == "identity" or name in SWINS
        self.tolerance = TOLERANCE[DTYPE[name]]

    def copies(self):
        return copy.deepcopy(self.donor), copy.deepcopy(self.converted)


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(name, to="identity"):
        if (name, to) not in made:
            try:
                made[name, to] = Pair(name, to)
            except Exception as cause:
                made[name, to] = cause
        if isinstance(made[name, to], Exception):
            raise made[name, to]
        return made[name, to]

    return pair


@pytest.fixture(params=CONVERSIONS, ids="-".join)
def pair(request, pairs):
    return pairs(*request.param)


@pytest.fixture(params=BUILDERS)
def identity(request, pairs):
    return pairs(request.param, "identity")


@torch.no_grad()
def run(model, batch, **options):
    return logits(model(batch, **options))


def rewritten_names(model):
    return {name for name, module in model.named_modules() if hasattr(module, "attnrewrite_rewriting")}


# --- the module tree, its parameters, its checkpoint


def test_every_module_keeps_its_name_and_class(pair):
    for name, module in pair.donor.named_modules():
        assert isinstance(pair.converted.get_submodule(name), type(module)), name


def test_something_was_rewritten_and_the_donor_was_not(pair):
    assert rewritten_names(pair.converted)
    assert not rewritten_names(pair.donor)


def test_identity_keeps_the_function(identity):
    error = difference(run(identity.converted, identity.batch), run(identity.donor, identity.batch))
    assert error < identity.tolerance
    kinds = {site.kind for site in attnrewrite.report(identity.converted).converted}
    assert kinds == {"attention", "mlp", "stem"}


def test_identity_refuses_no_site(identity):
    """Every site there is can be rebuilt; a refused one was no site, and would make ``strict`` fail."""
    refused = [site for site in attnrewrite.report(identity.converted).sites if site.status == "refused"]
    assert [(site.name, site.source, site.why) for site in refused] == []


@pytest.mark.parametrize("name", SWINS)
def test_windows_become_neighborhoods_exactly(pairs, name):
    pair = pairs(name, "neighborhood")
    assert difference(run(pair.converted, pair.batch), run(pair.donor, pair.batch)) < 1e-12


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_batch_of_the_example_does_not_matter(pair, batch):
    many = images(pair.name, 5)
    together = run(pair.converted, many)
    assert difference(run(pair.converted, many[:batch]), together[:batch]) < pair.tolerance


@pytest.mark.parametrize("name", ["timm_vit", "torchvision_swin", "transformers_swin"])
def test_an_example_of_several_images_converts_the_same_sites(pairs, name):
    one = attnrewrite.report(pairs(name).converted)
    several = attnrewrite.report(converted_from(pairs(name).donor, name, "identity", images(name, 3)))
    assert [site.name for site in several.converted] == [site.name for site in one.converted]


def test_state_dict_keeps_keys_order_shapes_and_values(pair):
    before, after = pair.donor.state_dict(), pair.converted.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_the_original_checkpoint_loads_strictly(pair):
    converted = copy.deepcopy(pair.converted)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert difference(run(converted, pair.batch), run(pair.converted, pair.batch)) > 1e-3
    converted.load_state_dict(pair.donor.state_dict(), strict=True)
    assert torch.equal(run(converted, pair.batch), run(pair.converted, pair.batch))


def test_a_checkpoint_of_the_converted_model_loads_into_the_original(pair):
    donor = small_model(pair.name)
    nn.init.zeros_(next(donor.parameters()))
    donor.load_state_dict(pair.converted.state_dict(), strict=True)
    assert torch.equal(run(donor, pair.batch), run(pair.donor, pair.batch))


@pytest.mark.parametrize("name", ["timm_vit", "torchvision_vit", "transformers_swin"])
def test_inplace_keeps_the_parameters_and_an_optimizer_made_before(name):
    donor, model = small_model(name), small_model(name)
    before = dict(model.named_parameters())
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (donor, model)]
    assert attnrewrite.convert(model, "identity", images(name, 1), inplace=True) is model
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[key] is parameter for key, parameter in before.items())
    untrained = run(donor, images(name))
    for module, optimizer in zip((donor, model), optimizers, strict=True):
        logits(module(images(name))).square().mean().backward()
        optimizer.step()
    assert difference(run(model, images(name)), untrained) > 1e-6
    assert difference(run(model, images(name)), run(donor, images(name))) < 1e-9


def test_forward_keeps_its_signature(identity):
    """Trainer drops the columns that the signature does not name, and torch.export finds dynamic shapes by it."""
    for name, module in identity.donor.named_modules():
        ours = identity.converted.get_submodule(name)
        assert inspect.signature(ours.forward) == inspect.signature(module.forward), name


def test_a_copy_shares_no_parameter_with_the_original(pair):
    ours = {parameter.data_ptr() for parameter in pair.converted.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in pair.donor.parameters())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("name", "to"), [(n, to) for n, to in CONVERSIONS if to == "identity" or n in SWINS])
def test_gradients_equal_the_originals(pairs, name, to, train):
    pair = pairs(name, to)
    donor, converted = pair.copies()
    assert_same_gradients(gradients(converted, pair.batch, train), gradients(donor, pair.batch, train))


def test_every_parameter_that_had_a_gradient_has_one(pair):
    donor, converted = pair.copies()
    expected, actual = gradients(donor, pair.batch), gradients(converted, pair.batch)
    assert {n for n, g in actual.items() if g is None} == {n for n, g in expected.items() if g is None}


def test_the_gradient_of_the_image_equals_the_originals(identity):
    found = []
    for model in (identity.donor, identity.converted):
        batch = identity.batch.clone().requires_grad_()
        found.append(torch.autograd.grad(logits(model(batch)).square().sum(), batch)[0])
    assert difference(found[1], found[0]) < 1000 * identity.tolerance


def test_frozen_parameters_stay_frozen():
    donor = small_model("timm_vit")
    donor.blocks[0].attn.qkv.requires_grad_(False)
    converted = converted_from(donor, "timm_vit", "neighborhood")
    frozen = [name for name, parameter in converted.named_parameters() if not parameter.requires_grad]
    assert frozen == ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]


# --- neighborhood attention against an independent oracle


def neighborhood_mask(height, width, kernel, prefix):
    """Which keys a query sees, by the rule as it is published: a window that slides inward at the border."""
    tokens = [(row, column) for row in range(height) for column in range(width)]
    mask = torch.ones(prefix + len(tokens), prefix + len(tokens), dtype=torch.bool)
    for q, query in enumerate(tokens):
        for k, key in enumerate(tokens):
            starts = [min(max(p - kernel // 2, 0), n - kernel) for p, n in zip(query, (height, width), strict=True)]
            inside = [start <= place < start + kernel for start, place in zip(starts, key, strict=True)]
            mask[prefix + q, prefix + k] = all(inside)
    return mask


@pytest.mark.parametrize(("size", "fused"), [((64, 64), True), ((64, 96), False), ((96, 48), True)], ids=str)
def test_neighborhood_equals_masked_attention(size, fused):
    donor = small_model("timm_vit" if fused else "timm_vit_unfused", img_size=size)
    batch = images("timm_vit", 2, size=size)
    converted = attnrewrite.convert(donor, "neighborhood", batch[:1], kernel_size=3)
    mask = neighborhood_mask(size[0] // 16, size[1] // 16, 3, prefix=1)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    expected = donor.forward_head(donor.forward_features(batch, attn_mask=bias))
    actual = converted(batch)
    assert difference(actual, expected) < 1e-9
    assert difference(actual, donor(batch)) > 1e-4
    wanted = torch.autograd.grad(expected.square().sum(), list(donor.parameters()))
    found = torch.autograd.grad(actual.square().sum(), list(converted.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-9 * largest


# --- training mode


DROPOUTS = [
    ("timm_vit", {"attn_drop_rate": 0.5}),
    ("timm_vit", {"proj_drop_rate": 0.5}),
    ("timm_swin", {"attn_drop_rate": 0.5}),
    ("torchvision_vit", {"attention_dropout": 0.5}),
    ("torchvision_vit", {"dropout": 0.5}),
    ("transformers_vit", {"attention_probs_dropout_prob": 0.5}),
    ("transformers_vit_eager", {"attention_probs_dropout_prob": 0.5}),
    ("transformers_vit", {"hidden_dropout_prob": 0.5}),
    ("transformers_swin", {"attention_probs_dropout_prob": 0.5}),
]
SLOW_DROPOUTS = [
    ("torchvision_swin", {"attention_dropout": 0.5}),
    ("timm_vit_unfused", {"attn_drop_rate": 0.5}),
    ("timm_swin", {"proj_drop_rate": 0.5}),
    ("torchvision_swin", {"dropout": 0.5}),
    ("transformers_swin", {"hidden_dropout_prob": 0.5}),
]


def spread(model, batch):
    """Mean and standard deviation of the logits over independent draws of whatever is random in training."""
    torch.manual_seed(3)
    model.train()
    drawn = run(model, batch[:1].expand(128, -1, -1, -1))
    model.eval()
    return drawn.mean(0), drawn.std(0)


@pytest.mark.parametrize(
    ("name", "rates"), DROPOUTS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_DROPOUTS], ids=str
)
def test_dropout_stays_live_and_as_strong(name, rates):
    donor, batch = small_model(name, **rates).float(), images(name, 1, torch.float32)
    mean, deviation = spread(donor, batch)
    assert float(deviation.min()) > 0.0
    to = "neighborhood" if "swin" in name and "att" in next(iter(rates)) else "identity"
    converted = attnrewrite.convert(donor, to, batch)
    assert torch.equal(run(converted, batch), run(converted, batch))
    assert difference(run(converted, batch), run(donor, batch)) < 1e-4
    found_mean, found_deviation = spread(converted, batch)
    ratio = float((found_deviation / deviation).log().mean().exp())
    assert 0.8 < ratio < 1.25, f"{to}: the deviation is {ratio:.2f} of the original's"
    assert float(((found_mean - mean).abs() / deviation).max()) < 0.6


@pytest.mark.parametrize("name", VITS)
def test_a_smaller_kernel_keeps_attention_dropout(name):
    rates = {"timm": "attn_drop_rate", "torc": "attention_dropout", "tran": "attention_probs_dropout_prob"}
    donor = small_model(name, **{rates[name[:4]]: 0.5})
    converted = converted_from(donor, name, "neighborhood")
    first, second = (run(converted.train(), images(name)) for _ in range(2))
    assert difference(first, second) > 1e-3
    converted.eval()
    assert torch.equal(run(converted, images(name)), run(converted, images(name)))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("timm_vit", {"drop_path_rate": 0.5}),
        pytest.param("timm_swin", {"drop_path_rate": 0.5}, marks=pytest.mark.slow),
        pytest.param("torchvision_swin", {"stochastic_depth_prob": 0.5}, marks=pytest.mark.slow),
        ("transformers_swin", {"drop_path_rate": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_drop_path_draws_as_the_original_does(name, rates):
    donor, to = small_model(name, **rates), "neighborhood" if name == "torchvision_swin" else "identity"
    converted = attnrewrite.convert(donor, to, images(name, 1))
    still = run(converted, images(name, 6))
    drawn = []
    for model in (donor, converted):
        torch.manual_seed(11)
        drawn.append(run(model.train(), images(name, 6)))
    assert difference(drawn[0], still) > 1e-3
    assert difference(drawn[1], drawn[0]) < 1e-12


@pytest.mark.parametrize("name", ["timm_vit", "transformers_swin"])
def test_a_model_converted_in_training_mode_stays_in_it(name):
    donor = small_model(name).train()
    next(donor.children()).eval()
    converted = converted_from(donor, name, "identity")
    for path, module in donor.named_modules():
        assert converted.get_submodule(path).training == module.training, path
    modes = {path: module.training for path, module in converted.named_modules()}
    for path, module in converted.named_modules():
        for child in module.attnrewrite_rewriting.modules if hasattr(module, "attnrewrite_rewriting") else ():
            assert modes[f"{path}.{child}".lstrip(".")] == module.training


# --- hooks


def fired(model, batch, kinds):
    """How often each module's forward hook runs."""
    count = {}

    def hook_of(name):
        def hook(module, arguments, output):
            count[name] = count.get(name, 0) + 1

        return hook

    handles = [m.register_forward_hook(hook_of(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    run(model, batch)
    for handle in handles:
        handle.remove()
    return count


def test_hooks_on_linears_and_norms_still_fire(pair):
    kinds = (nn.Linear, nn.LayerNorm)
    expected, actual = (fired(model, pair.batch, kinds) for model in (pair.donor, pair.converted))
    assert set(expected) <= set(actual)


def test_hooks_on_blocks_and_mlps_fire_as_often_as_before(pair):
    ends = ("mlp", "blocks.0", "blocks.1", "norm", "layer_0", "layers.0", "head", "classifier")
    kept = tuple({type(m) for n, m in pair.donor.named_modules() if n.endswith(ends)} - {nn.Identity, nn.Linear})
    expected, actual = (fired(model, pair.batch, kept) for model in (pair.donor, pair.converted))
    assert expected
    assert actual == expected


def projections_of(model):
    ends = ("qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value")
    return [m for n, m in model.named_modules() if n.split(".")[-1] in ends and isinstance(m, nn.Linear)]


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "torchvision_vit"])  # it has no such child
def test_a_hook_that_changes_a_projection_is_honoured(pairs, name):
    donor, converted = pairs(name).copies()
    before = run(donor, pairs(name).batch)
    for model in (donor, converted):
        found = projections_of(model)
        assert found
        for module in found:
            module.register_forward_hook(lambda module, arguments, output: 1.5 * output.tanh() + 0.1)
    after = run(donor, pairs(name).batch)
    calls_it = name != "torchvision_swin"  # that one reads the weights, and so must we
    assert (difference(after, before) > 1e-3) == calls_it
    assert difference(run(converted, pairs(name).batch), after) < pairs(name).tolerance


def test_hooks_on_the_rewritten_module_see_and_change_its_values(pair):
    donor, converted = pair.copies()
    path = next(site.name for site in attnrewrite.report(converted).converted if site.kind == "attention")
    while path not in rewritten_names(converted):
        path = path.rpartition(".")[0]
    before, changed = run(converted, pair.batch), []
    for model in (donor, converted):
        seen = []

        def square(module, arguments, output, seen=seen):
            seen.append(type(output))
            return (output[0] ** 2, *output[1:]) if isinstance(output, tuple) else output**2

        model.get_submodule(path).register_forward_hook(square)
        changed.append(run(model, pair.batch))
        assert len(seen) == 1
    assert difference(changed[1], before) > 1e-3
    if pair.same_function:
        assert difference(changed[1], changed[0]) < 10 * pair.tolerance


@pytest.mark.parametrize("name", SWINS)
def test_hooks_on_a_dissolved_module_are_kept_or_refused(pairs, name):
    """The rewritten block of a Swin computes its attention itself: a hook on the attention must not be lost."""
    donor, converted = pairs(name).copies()
    path = next(site.name for site in attnrewrite.report(converted).converted if site.kind == "attention")

    def halve(module, arguments, output):
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    donor.get_submodule(path).register_forward_hook(halve)
    try:
        converted = converted_from(donor, name, "identity")
    except AttnRewriteError:
        return
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    if path in {site.name for site in attnrewrite.report(converted).converted}:
        assert len(converted.get_submodule(path)._forward_hooks) == 1
        assert fired(converted, images(name), type(donor.get_submodule(path))).get(path) == 1


@pytest.mark.parametrize("name", ["timm_vit", "transformers_vit"])
def test_hooks_registered_before_conversion_still_work(name):
    donor = small_model(name)
    projections_of(donor)[0].register_forward_hook(lambda module, arguments, output: 2 * output)
    converted = converted_from(donor, name, "identity")
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12


def test_backward_hooks_fire(identity):
    _, converted = identity.copies()
    seen = []
    for module in converted.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_full_backward_hook(lambda module, given, taken: seen.append(module))
    logits(converted(identity.batch)).sum().backward()
    assert len(set(seen)) == sum(isinstance(module, nn.LayerNorm) for module in converted.modules())


# --- copies and files


def test_deepcopy_is_independent(pair):
    expected = run(pair.converted, pair.batch)
    copied = copy.deepcopy(pair.converted)
    assert torch.equal(run(copied, pair.batch), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(run(pair.converted, pair.batch), expected)
    assert difference(run(copied, pair.batch), expected) > 1e-3


def test_pickle_round_trip(pair):
    restored = pickle.loads(pickle.dumps(pair.converted))
    assert torch.equal(run(restored, pair.batch), run(pair.converted, pair.batch))
    assert rewritten_names(restored) == rewritten_names(pair.converted)
    assert str(attnrewrite.report(restored)) == str(attnrewrite.report(pair.converted))


LOADING = """
import json, sys, torch
sys.path.insert(0, {root!r})
from attnrewrite.torchvision_compat import ensure_torchvision
ensure_torchvision()
found = {{}}
for path in sys.argv[1:]:
    saved = torch.load(path, weights_only=False)
    with torch.no_grad():
        output = saved["model"](saved["batch"])
    output = getattr(output, "logits", output)
    found[path] = float((output - saved["expected"]).abs().max())
    rewritten = [m for m in saved["model"].modules() if hasattr(m, "attnrewrite_rewriting")]
    assert rewritten, path
print(json.dumps(found))
"""


def test_a_saved_model_loads_in_a_fresh_process(pairs, tmp_path):
    paths, failures = [], []
    for name, to in CONVERSIONS:
        try:
            pair = pairs(name, to)
        except Exception as cause:
            failures.append(f"{name} {to}: {cause}")
            continue
        paths.append(str(tmp_path / f"{name}-{to}.pt"))
        saved = {"model": pair.converted, "batch": pair.batch, "expected": run(pair.converted, pair.batch)}
        torch.save(saved, paths[-1])
    code = LOADING.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert list(errors) == paths
    assert max(errors.values()) < 1e-12
    assert not failures


# --- compilers and precision


@pytest.mark.parametrize(
    "name", ["timm_swin", pytest.param("torchvision_vit", marks=pytest.mark.slow), "transformers_swin"]
)
def test_torch_export_of_the_converted_model(pairs, name):
    pair = pairs(name, "identity" if "vit" in name else "neighborhood")
    exported = torch.export.export(pair.converted, (pair.batch,), strict=False)
    assert difference(logits(exported.module()(pair.batch)), run(pair.converted, pair.batch)) < pair.tolerance


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        ("torchvision_vit", "identity"),
        pytest.param("torchvision_swin", "neighborhood", marks=pytest.mark.slow),
        ("transformers_vit", "identity"),
    ],
)  # the originals of all four can
def test_torch_export_with_a_dynamic_batch(pairs, name, to):
    pair = pairs(name, to)
    argument = "pixel_values" if "transformers" in name else "x"
    dynamic = {argument: {0: Dim("batch", min=2, max=64)}}
    exported = torch.export.export(pair.converted, (pair.batch,), dynamic_shapes=dynamic, strict=False)
    more = images(name, 5)
    assert difference(logits(exported.module()(more)), run(pair.converted, more)) < 1e-12


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        pytest.param("torchvision_swin", "identity", marks=pytest.mark.slow),
        pytest.param("transformers_vit", "identity", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_keeps_the_values(pairs, name, to):
    pair = pairs(name, to)
    torch.compiler.reset()
    model = copy.deepcopy(pair.converted)
    compiled = torch.compile(model, backend="aot_eager", fullgraph="transformers" not in name)
    with torch.no_grad():
        assert difference(logits(compiled(pair.batch)), run(pair.converted, pair.batch)) < 1e-12


def test_torch_compile_trains(pairs):
    pair = pairs("timm_vit", "neighborhood")
    torch.compiler.reset()
    _, converted = pair.copies()
    expected = gradients(copy.deepcopy(converted), pair.batch)
    compiled = torch.compile(converted, backend="aot_eager")
    (logits(compiled(pair.batch)) * torch.arange(1, 6)).square().sum().backward()
    assert_same_gradients({name: p.grad for name, p in converted.named_parameters()}, expected)


def test_autocast_to_bfloat16_is_close(pair):
    donor, converted = (model.float() for model in pair.copies())
    batch = pair.batch.float()
    expected = run(converted, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual, theirs = run(converted, batch), run(donor, batch)
    assert actual.dtype == theirs.dtype
    assert bool(actual.isfinite().all())
    error, original = (difference(output.float(), expected) for output in (actual, theirs))
    assert error < (1.5 * original + 0.02 if pair.same_function else 0.15)


def test_gradients_under_autocast_are_finite(pair):
    converted = copy.deepcopy(pair.converted).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = logits(converted(pair.batch.float())).float().square().sum()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in converted.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["timm_vit_unfused", "timm_swin", "torchvision_vit", "transformers_vit_eager"])
def test_a_bfloat16_model_converts(name):
    donor, to = small_model(name).bfloat16(), "neighborhood"
    converted = attnrewrite.convert(donor, to, images(name, 1, torch.bfloat16))
    actual, expected = (run(model, images(name, 2, torch.bfloat16)) for model in (converted, donor))
    assert actual.dtype == torch.bfloat16
    assert difference(actual.float(), expected.float()) < 0.1
    assert {site.kind for site in attnrewrite.report(converted).converted} == {"attention"}


def test_a_converted_model_can_change_its_dtype(identity):
    single = copy.deepcopy(identity.converted).float()
    half = copy.deepcopy(identity.converted).bfloat16()
    expected = run(identity.converted, identity.batch)
    assert difference(run(single, identity.batch.float()).double(), expected.double()) < 1e-4
    assert difference(run(half, identity.batch.bfloat16()).double(), expected.double()) < 0.1


# --- sharing and checkpointing


@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_a_block_used_twice_stays_one_block(to):
    donor = small_model("timm_vit")
    donor.blocks[1] = donor.blocks[0]
    converted = converted_from(donor, "timm_vit", to)
    assert converted.blocks[1] is converted.blocks[0]
    assert len(list(converted.parameters())) == len(list(donor.parameters()))
    assert list(converted.state_dict()) == list(donor.state_dict())
    if to == "identity":
        assert difference(run(converted, images("timm_vit")), run(donor, images("timm_vit"))) < 1e-12
        assert_same_gradients(gradients(converted, images("timm_vit")), gradients(donor, images("timm_vit")))
    else:
        assert rewritten_names(converted)


def test_tied_weights_stay_tied():
    donor = small_model("timm_vit")
    donor.blocks[1].attn.qkv.weight = donor.blocks[0].attn.qkv.weight
    converted = converted_from(donor, "timm_vit", "identity")
    assert converted.blocks[1].attn.qkv.weight is converted.blocks[0].attn.qkv.weight
    assert_same_gradients(gradients(converted, images("timm_vit")), gradients(donor, images("timm_vit")))


def checkpointed(model, name):
    if name.startswith("timm"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "transformers_vit", "transformers_swin"])
def test_gradient_checkpointing_after_conversion(pairs, name):
    pair = pairs(name, "neighborhood" if name.endswith("vit") else "identity")
    _, plain = pair.copies()
    _, converted = pair.copies()
    expected = gradients(plain, pair.batch, train=True)
    assert_same_gradients(gradients(checkpointed(converted, name), pair.batch, train=True), expected)


@pytest.mark.parametrize("name", ["timm_vit", pytest.param("transformers_swin", marks=pytest.mark.slow)])
def test_gradient_checkpointing_switched_on_before_conversion(pairs, name):
    donor = checkpointed(small_model(name), name)
    converted = converted_from(donor, name, "identity")
    expected = gradients(small_model(name), images(name), train=True)
    assert_same_gradients(gradients(converted, images(name), train=True), expected)


# --- timm's methods


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_unfused", "timm_swin"])
def test_timm_features_equal_the_originals(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model.forward_features(pair.batch) for model in (pair.donor, pair.converted))
        assert difference(actual, expected) < 1e-12
        expected, actual = (
            model.forward_intermediates(pair.batch, intermediates_only=True) for model in (pair.donor, pair.converted)
        )
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 1e-12


def test_timm_intermediate_layers_equal_the_originals(pairs):
    pair = pairs("timm_vit")
    with torch.no_grad():
        expected, actual = (model.get_intermediate_layers(pair.batch, n=2) for model in (pair.donor, pair.converted))
    for ours, theirs in zip(actual, expected, strict=True):
        assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin"])
@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_timm_reset_classifier(pairs, name, to):
    _, converted = pairs(name, to).copies()
    with torch.no_grad():
        before = converted.forward_features(pairs(name, to).batch)
    converted.reset_classifier(3)
    converted.double()
    assert run(converted, pairs(name, to).batch).shape == (2, 3)
    with torch.no_grad():
        assert torch.equal(converted.forward_features(pairs(name, to).batch), before)
    converted.reset_classifier(0)
    assert run(converted, pairs(name, to).batch).ndim == 2


@pytest.mark.parametrize(
    "size",
    [
        {"img_size": (112, 112)},
        {"img_size": (84, 84)},
        {"img_size": (112, 112), "window_size": 7},
        {"img_size": (56, 56), "window_size": 4},
    ],
    ids=str,
)
def test_timm_swin_set_input_size_is_right_or_refused(pairs, size):
    donor, converted = pairs("timm_swin", "neighborhood").copies()
    donor.set_input_size(**size)
    batch = images("timm_swin", 2, size=size["img_size"])
    try:
        converted.set_input_size(**size)
        actual = run(converted, batch)
    except AttnRewriteError:
        return
    assert difference(actual, run(donor, batch)) < 1e-9


def test_timm_swin_set_input_size_to_the_present_one_changes_nothing(pairs):
    _, converted = pairs("timm_swin", "neighborhood").copies()
    converted.set_input_size(img_size=(56, 56))
    assert difference(run(converted, images("timm_swin")), run(pairs("timm_swin").donor, images("timm_swin"))) < 1e-12


def test_timm_vit_set_input_size_is_right_or_refused(pairs):
    donor, converted = pairs("timm_vit").copies()
    for model in (donor, converted):
        model.set_input_size(img_size=(96, 96))
    batch = images("timm_vit", size=(96, 96))
    assert equal_or_refused(donor, converted, batch)


def test_timm_names_for_optimizers_stay(pairs):
    pair = pairs("timm_swin", "neighborhood")
    assert pair.converted.no_weight_decay() == pair.donor.no_weight_decay()
    assert pair.converted.group_matcher() == pair.donor.group_matcher()


# --- transformers' outputs


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_vit_eager", "transformers_swin"])
def test_hidden_states_equal_the_originals(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model(pair.batch, output_hidden_states=True) for model in (pair.donor, pair.converted))
    assert len(actual.hidden_states) == len(expected.hidden_states) > 2
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert difference(ours, theirs) < pair.tolerance


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_vit_eager", "transformers_swin"])
@pytest.mark.parametrize("to", ["identity", "neighborhood"])
def test_output_attentions_gives_weights_or_an_error(pairs, name, to):
    pair = pairs(name, to)
    try:
        with torch.no_grad():
            attentions = pair.converted(pair.batch, output_attentions=True).attentions
    except AttnRewriteError:
        return
    assert attentions
    assert all(isinstance(weights, torch.Tensor) and weights.shape[-1] >= 17 for weights in attentions)
    assert len(attentions) >= 2
    for weights in attentions:
        assert float((weights.sum(-1) - 1).abs().max()) < 1e-5


def test_eager_attentions_are_those_of_the_new_operator():
    """Attention weights of a smaller kernel: nothing outside of it; the original's dense weights would be wrong."""
    donor = small_model("transformers_swin", attn_implementation="eager", depths=[1, 1], image_size=56).float()
    example = images("transformers_swin", 1, torch.float32)
    converted = attnrewrite.convert(donor, "neighborhood", example, kernel_size=3)
    (site,) = attnrewrite.report(converted).converted
    assert site.name == "swin.encoder.layers.1.blocks.0.attention"
    try:
        with torch.no_grad():
            attentions = converted(example, output_attentions=True).attentions
    except AttnRewriteError:
        return
    outside = ~neighborhood_mask(7, 7, 3, prefix=0)
    assert float(attentions[-1][..., outside].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["transformers_vit", "transformers_swin"])
def test_tuples_instead_of_output_objects(pairs, name):
    pair = pairs(name)
    with torch.no_grad():
        expected, actual = (model(pair.batch, return_dict=False) for model in (pair.donor, pair.converted))
    assert isinstance(actual, tuple)
    assert difference(actual[0], expected[0]) < 1e-12


def test_labels_give_the_same_loss(pairs):
    pair = pairs("transformers_vit")
    labels = torch.tensor([1, 4])
    with torch.no_grad():
        expected, actual = (model(pair.batch, labels=labels).loss for model in (pair.donor, pair.converted))
    assert abs(float(actual - expected)) < 1e-12


def test_save_pretrained_round_trip(pairs, tmp_path):
    pair = pairs("transformers_vit")
    pair.converted.save_pretrained(tmp_path)
    loaded = type(pair.donor).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert difference(run(loaded, pair.batch), run(pair.donor, pair.batch)) < 1e-12


def test_switching_the_attention_implementation_is_right_or_refused(pairs):
    donor, converted = pairs("transformers_vit").copies()
    converted.set_attn_implementation("eager")
    batch = images("transformers_vit")
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


class Returning(nn.Module):
    """One attention, whose result is packed in some way."""

    def __init__(self, pack):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.query, self.key, self.value, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.pack = pack

    def forward(self, image):
        x = self.stem(image).flatten(2).transpose(1, 2)
        query, key, value = (
            part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.pack(self.proj(mixed), x)


class Named(NamedTuple):
    last_hidden_state: torch.Tensor
    hidden_states: tuple


def named(result, x):
    return Named(result, (x,))


def output_object(result, x):
    return BaseModelOutput(last_hidden_state=result, hidden_states=(x,))


def dictionary(result, x):
    return {"last_hidden_state": result, "hidden_states": [x, None, 3]}


@pytest.mark.parametrize("pack", [named, output_object, dictionary])
def test_the_result_keeps_its_structure(pack):
    donor, batch = Returning(pack), torch.randn(2, 3, 32, 32)
    converted = attnrewrite.convert(donor, "identity", batch[:1])
    assert rewritten_names(converted) == {""}
    with torch.no_grad():
        expected, actual = donor(batch), converted(batch)
    assert type(actual) is type(expected)
    ours, theirs = tree_flatten(actual), tree_flatten(expected)
    assert ours[1] == theirs[1]
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert torch.allclose(one, other, atol=1e-5) if isinstance(other, torch.Tensor) else one == other


# --- torchvision's nn.MultiheadAttention


def test_multihead_attention_returns_the_pair_it_did(pairs):
    pair = pairs("torchvision_vit")
    query = torch.randn(2, 17, 48, dtype=torch.float64)
    name = "encoder.layers.encoder_layer_0.self_attention"
    expected, actual = (
        model.get_submodule(name)(query, query, query, need_weights=False) for model in (pair.donor, pair.converted)
    )
    assert isinstance(actual, tuple)
    assert len(actual) == 2
    assert actual[1] is None
    assert difference(actual[0], expected[0]) < 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda mha, x: mha(x, x, x),
        lambda mha, x: mha(x, x + 1, x, need_weights=False),
        lambda mha, x: mha(x, x, x, need_weights=False, attn_mask=torch.ones(17, 17).triu(1).bool()),
        lambda mha, x: mha(x, x, x, need_weights=False, key_padding_mask=torch.arange(17).expand(2, -1) > 8),
    ],
    ids=["need_weights", "another_key", "attn_mask", "key_padding_mask"],
)
def test_multihead_attention_called_otherwise_is_right_or_refused(pairs, call):
    pair = pairs("torchvision_vit")
    query = torch.randn(2, 17, 48, dtype=torch.float64)
    name = "encoder.layers.encoder_layer_0.self_attention"
    expected = call(pair.donor.get_submodule(name), query)
    try:
        actual = call(pair.converted.get_submodule(name), query)
    except AttnRewriteError:
        return
    assert difference(actual[0], expected[0]) < 1e-12
    assert (actual[1] is None) == (expected[1] is None)


# --- parallel training


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train_two_steps(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        logits(model.train()(batch)).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        ("timm_swin", "neighborhood"),
        ("torchvision_vit", "identity"),
        ("torchvision_swin", "identity"),
        ("transformers_swin", "identity"),
    ],
)
def test_convert_then_distributed_data_parallel(pairs, process_group, name, to):
    pair = pairs(name, to)
    _, alone = pair.copies()
    _, wrapped = pair.copies()
    train_two_steps(alone, pair.batch)
    train_two_steps(DistributedDataParallel(wrapped), pair.batch)
    assert difference(run(alone, pair.batch), run(pair.converted, pair.batch)) > 1e-6
    assert difference(run(wrapped, pair.batch), run(alone, pair.batch)) < 1e-9


def test_convert_then_fully_shard(pairs, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pair = pairs("timm_swin", "neighborhood")
    _, alone = pair.copies()
    _, sharded = pair.copies()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train_two_steps(alone, pair.batch)
    train_two_steps(sharded, pair.batch)
    assert difference(run(sharded, pair.batch), run(alone, pair.batch)) < 1e-9


def assert_refused_as_wrapped(model):
    with pytest.raises(AttnRewriteError, match=r"(?s)model: .*convert.*then wrap"):
        attnrewrite.convert(model, "identity", images("timm_vit", 1))


def test_a_distributed_model_is_refused(process_group):
    assert_refused_as_wrapped(DistributedDataParallel(small_model("timm_vit")))


def test_a_compiled_model_is_refused():
    assert_refused_as_wrapped(torch.compile(small_model("timm_vit"), backend="aot_eager"))


def test_a_data_parallel_model_is_refused():
    assert_refused_as_wrapped(nn.DataParallel(small_model("timm_vit")))


def test_a_sharded_model_is_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model("timm_vit")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert_refused_as_wrapped(model)


def test_a_compiled_child_is_right_or_refused():
    donor = small_model("timm_vit")
    donor.blocks[0].attn = torch.compile(donor.blocks[0].attn, backend="eager")
    expected = run(donor, images("timm_vit"))
    try:
        converted = attnrewrite.convert(donor, "identity", images("timm_vit", 1))
    except AttnRewriteError:
        return
    assert difference(run(converted, images("timm_vit")), expected) < 1e-12
    assert list(converted.state_dict()) == list(donor.state_dict())


# --- adapters


class LowRank(nn.Module):
    """A linear map with a trainable low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    torch.manual_seed(5)
    for name, module in list(model.named_modules()):
        if any(module is projection for projection in projections_of(model)):
            model.set_submodule(name, LowRank(module))
    assert any(isinstance(module, LowRank) for module in model.modules())
    return model


ADAPTED = ["timm_vit", "timm_vit_unfused", "timm_swin", "transformers_vit", "transformers_swin"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_before_conversion(name):
    donor = adapt(small_model(name))
    converted = converted_from(donor, name, "identity")
    assert any("attn" in n or "attention" in n for n in (s.name for s in attnrewrite.report(converted).converted))
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_after_conversion(pairs, name):
    donor, converted = pairs(name).copies()
    before = run(donor, images(name))
    adapt(donor), adapt(converted)
    assert difference(run(donor, images(name)), before) > 1e-4
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


@pytest.mark.parametrize("name", ["timm_vit", pytest.param("timm_swin", marks=pytest.mark.slow)])
def test_weight_norm_before_conversion(name):
    donor = small_model(name)
    for projection in projections_of(donor):
        nn.utils.parametrizations.weight_norm(projection)
    converted = converted_from(donor, name, "identity")
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
    assert_same_gradients(gradients(converted, images(name)), gradients(donor, images(name)))


# --- other image sizes


def equal_or_refused(donor, converted, batch, **options):
    """Whether the converted model gives the original's result, or says clearly that it cannot."""
    expected = run(donor, batch, **options)
    try:
        actual = run(converted, batch, **options)
    except AttnRewriteError:
        return True
    return difference(actual, expected) < 1e-9


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        pytest.param("timm_vit", (64, 96), {"img_size": (64, 96)}, marks=pytest.mark.slow),
        ("timm_swin", (56, 112), {"img_size": (56, 112)}),
        ("torchvision_swin", (112, 56), {}),
        pytest.param("transformers_vit", (96, 64), {"image_size": (96, 64)}, marks=pytest.mark.slow),
        pytest.param("transformers_swin", (56, 112), {"image_size": (56, 112)}, marks=pytest.mark.slow),
    ],
)
def test_images_that_are_not_square(name, size, options):
    donor, to = small_model(name, **options), "neighborhood" if name == "timm_swin" else "identity"
    batch = images(name, 2, size=size)
    converted = attnrewrite.convert(donor, to, batch[:1])
    assert "attention" in {site.kind for site in attnrewrite.report(converted).converted}
    assert difference(run(converted, batch), run(donor, batch)) < 1e-12


OTHER_SIZES = [(112, 112), (84, 84), (56, 84), (100, 60), (28, 28), (40, 72)]


@pytest.fixture(scope="module")
def flexible():
    made = {}

    def pair(name, to):
        if (name, to) not in made:
            donor = small_model(name, **({"strict_img_size": False} if name == "timm_swin" else {}))
            made[name, to] = donor, attnrewrite.convert(donor, to, images(name, 1))
        return made[name, to]

    return pair


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in SWINS for size in OTHER_SIZES if name != "transformers_swin" or min(size) > 40],
    ids=str,
)  # the one of transformers takes no map below its window
def test_windows_at_another_size_are_right_or_refused(flexible, name, size):
    donor, converted = (copy.deepcopy(model) for model in flexible(name, "identity"))  # some remember their sizes
    expected = run(donor, images(name, size=size))
    try:
        actual = run(converted, images(name, size=size))
    except AttnRewriteError:
        return
    assert difference(actual, expected) < 1e-9


@pytest.mark.parametrize("name", [pytest.param("timm_swin", marks=pytest.mark.slow), "torchvision_swin"])
def test_windows_follow_the_image_when_it_grows(name):
    """Where all windows, shifts and borders were seen, refusing a larger map would be too careful."""
    donor = small_model(name, **({"img_size": 112, "strict_img_size": False} if name == "timm_swin" else {}))
    converted = attnrewrite.convert(donor, "neighborhood", images(name, 1, size=(112, 112)))
    batch = images(name, size=(112, 224))
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    donor = timm_pvt().double().eval()
    return donor, attnrewrite.convert(donor, "identity", torch.randn(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 96), (128, 64)], ids=str)
def test_a_pyramid_at_another_size_is_right_or_refused(pyramid, size):
    assert equal_or_refused(*pyramid, torch.randn(2, 3, *size, dtype=torch.float64))


def test_a_pyramid_follows_the_image_when_it_grows(pyramid):
    donor, converted = pyramid
    batch = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    assert difference(run(converted, batch), run(donor, batch)) < 1e-9


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 80)], ids=str)
def test_a_timm_vit_of_dynamic_size_is_right_or_refused(size):
    donor = small_model("timm_vit", dynamic_img_size=True)
    converted = attnrewrite.convert(donor, "identity", images("timm_vit", 1))
    assert equal_or_refused(donor, converted, images("timm_vit", size=size))


@pytest.mark.parametrize("size", [(96, 96), (64, 128)], ids=str)
def test_interpolated_position_encodings_are_right_or_refused(pairs, size):
    pair = pairs("transformers_vit")
    batch = images("transformers_vit", size=size)
    assert equal_or_refused(pair.donor, pair.converted, batch, interpolate_pos_encoding=True)


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 80), (64, 16)], ids=str)
def test_a_kernel_at_another_size_is_right_or_refused(size):
    """The map's sides cannot be read off a sequence: 4x8 tokens converted as a square map must not pass as another."""
    donor = small_model("timm_vit", dynamic_img_size=True)
    converted = attnrewrite.convert(donor, "neighborhood", images("timm_vit", 1), kernel_size=1)
    batch = images("timm_vit", size=size)
    mask = neighborhood_mask(size[0] // 16, size[1] // 16, 1, prefix=1)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        expected = donor.forward_head(donor.forward_features(batch, attn_mask=bias))
    try:
        actual = run(converted, batch)
    except AttnRewriteError:
        return
    assert difference(actual, expected) < 1e-9


@pytest.mark.parametrize("size", [(128, 32), (32, 128)], ids=str)
def test_another_map_with_as_many_tokens_is_right_or_refused(size):
    """2x8 and 4x4 patches are sixteen tokens both, but not the same neighbourhoods."""
    donor = small_model("timm_vit", dynamic_img_size=True)
    converted = attnrewrite.convert(donor, "neighborhood", images("timm_vit", 1), kernel_size=2)
    batch = images("timm_vit", size=size)
    mask = neighborhood_mask(size[0] // 16, size[1] // 16, 2, prefix=1)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        expected = donor.forward_head(donor.forward_features(batch, attn_mask=bias))
    try:
        actual = run(converted, batch)
    except AttnRewriteError:
        return
    assert difference(actual, expected) < 1e-9
