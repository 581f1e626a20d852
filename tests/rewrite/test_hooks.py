"""Hooks fire in a converted model, and what they change is honored."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from model_queries import projections_of, rewritten_names, run
from pairs import CONVERSIONS, converted_from
from repetition import thinned
from small_models import BUILDERS, difference, images, logits, small_model
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionWarning


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


@pytest.mark.parametrize(("name", "to"), thinned(CONVERSIONS, 3))
def test_hooks_on_linears_and_norms_still_fire(pairs, name, to):
    pair, kinds = pairs(name, to), (nn.Linear, nn.LayerNorm)
    expected, actual = (fired(model, pair.batch, kinds) for model in (pair.donor, pair.converted))
    assert expected
    assert set(expected) <= set(actual)


def test_hooks_on_blocks_and_mlps_fire_as_often_as_before(pair):
    ends = ("mlp", "blocks.0", "blocks.1", "norm", "layer_0", "layers.0", "head", "classifier")
    kept = tuple({type(m) for n, m in pair.donor.named_modules() if n.endswith(ends)} - {nn.Identity, nn.Linear})
    expected, actual = (fired(model, pair.batch, kept) for model in (pair.donor, pair.converted))
    assert expected
    assert actual == expected


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "torchvision_vit"])  # it has no such child
def test_a_hook_that_changes_a_projection_is_honored(pairs, name):
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


@pytest.mark.parametrize(
    ("name", "status"),
    [("timm_swin", "refused"), ("transformers_swin", "refused"), ("torchvision_swin", "converted")],
)  # torchvision's attention is rewritten itself; the others' dissolve in their block, and the hook is in the way
def test_hooks_on_an_attention_keep_their_effect(pairs, name, status):
    donor, converted = pairs(name).copies()
    path = next(site.name for site in attnrewrite.report(converted).converted if site.kind == "attention")

    def halve(module, arguments, output):
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    before = run(donor, images(name))
    donor.get_submodule(path).register_forward_hook(halve)
    converted = converted_from(donor, name, "identity")
    assert {site.name: site.status for site in attnrewrite.report(converted).sites}[path] == status
    assert difference(run(donor, images(name)), before) > 1e-3
    assert difference(run(converted, images(name)), run(donor, images(name))) < 1e-12
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


WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}


def swin(**options):
    model = timm.models.swin_transformer.SwinTransformer(**{**WINDOWS, "num_classes": 5, **options}).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # then its softmax and dropout are modules that are called
    return model


@pytest.mark.parametrize("child", ["attn.softmax", "attn.attn_drop", "attn", "mlp.act"])
@pytest.mark.parametrize("to", ["identity", "neighborhood", "conv_glu"])
def test_a_child_with_a_hook_is_still_called_and_its_site_refused(child, to):
    donor, seen = swin(), []
    donor.layers[0].blocks[1].get_submodule(child).register_forward_hook(lambda *_: seen.append(1))
    converted, report = attnrewrite.convert(donor, to, torch.randn(1, 3, 32, 32), progress=False, return_report=True)
    seen.clear()
    converted(torch.randn(2, 3, 32, 32))
    assert seen == [1]
    refused = {site.name: site.why for site in report.sites if site.status == "refused"}
    owner, path = ("Mlp", "act") if child == "mlp.act" else ("SwinTransformerBlock", child)
    reason = f"{owner} cannot be rewritten: hooks on its child {path} would no longer fire"
    touched = to == "identity" or (to == "conv_glu") == (child == "mlp.act")
    assert refused == ({f"layers.0.blocks.1.{child.partition('.')[0]}": reason} if touched else {})


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_put_on_later_on_a_child_that_is_not_called_says_so(kind):
    converted = attnrewrite.convert(swin(), "identity", torch.randn(1, 3, 32, 32), progress=False)
    for path in ("attn", "attn.softmax", "attn.attn_drop"):
        child = converted.layers[0].blocks[0].get_submodule(path)
        with pytest.warns(ConversionWarning, match=rf"layers.0.blocks.0.{path} is no longer called") as told:
            getattr(child, f"register_{kind}")(lambda *_: None)
        assert told[0].filename == __file__ or "torch" in told[0].filename


def test_hooks_put_on_later_are_quiet_where_they_fire_and_after_revert(recwarn):
    converted = attnrewrite.convert(swin(), "identity", torch.randn(1, 3, 32, 32), progress=False)
    live = [m for n, m in converted.named_modules() if n.endswith(("qkv", "proj", "norm1", "mlp", "blocks.0"))]
    assert len(live) > 5
    for module in live:
        module.register_forward_hook(lambda *_: None)
    for module in copy.deepcopy(attnrewrite.revert(converted)).modules():
        module.register_forward_hook(lambda *_: None)
        assert type(module._forward_hooks) is OrderedDict
    assert not [warning for warning in recwarn if issubclass(warning.category, ConversionWarning)]


def test_a_late_hook_outlives_revert_and_can_be_removed():
    converted = attnrewrite.convert(swin(), "identity", torch.randn(1, 3, 32, 32), progress=False)
    seen = []
    with pytest.warns(ConversionWarning):
        handle = converted.layers[0].blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    reverted = attnrewrite.revert(converted)
    reverted(torch.randn(1, 3, 32, 32))
    assert seen == [1]
    handle.remove()
    reverted(torch.randn(1, 3, 32, 32))
    assert seen == [1]


def test_a_copy_of_a_converted_model_still_tells_and_converts_again():
    converted = attnrewrite.convert(swin(), "identity", torch.randn(1, 3, 32, 32), progress=False)
    loaded = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    with pytest.warns(ConversionWarning, match="attn.softmax"):
        loaded.layers[0].blocks[1].attn.softmax.register_forward_pre_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        again = attnrewrite.convert(loaded, "conv_glu", torch.randn(1, 3, 32, 32), progress=False)
    mlps = [site.name for site in attnrewrite.report(again).converted if site.kind == "mlp"]
    assert mlps == ["layers.0.blocks.0.mlp", "layers.0.blocks.1.mlp"]
    batch = torch.randn(2, 3, 32, 32)
    assert difference(run(again, batch), run(converted, batch)) < 1e-5


@pytest.mark.parametrize(("size", "times"), [(32, 1), (40, 1), (36, 2)])
@pytest.mark.parametrize(("to", "options"), [("identity", {}), ("neighborhood", {"kernel_size": 3})])
def test_a_projection_fires_once_and_again_for_the_padding_that_the_original_gives_it(size, times, to, options):
    """36 pixels are 18 tokens per side, which windows of 4 do not divide."""
    donor, seen = swin(strict_img_size=False), []
    converted = attnrewrite.convert(donor, to, torch.randn(1, 3, 32, 32), progress=False, **options)
    converted.layers[0].blocks[0].attn.qkv.register_forward_hook(lambda m, given, made: seen.append(tuple(made.shape)))
    converted(torch.randn(2, 3, size, size))
    assert seen[0] == (2, size // 2, size // 2, 48)
    assert len(seen) == (times if to == "identity" else 1)


def test_a_model_whose_silenced_child_was_deleted_is_reverted():
    donor = swin()
    converted = attnrewrite.convert(donor, "identity", torch.randn(1, 3, 32, 32), progress=False)
    del converted.layers[0].blocks[0].attn.attn_drop
    reverted = attnrewrite.revert(converted)
    assert type(reverted.layers[0].blocks[0]) is type(donor.layers[0].blocks[0])
