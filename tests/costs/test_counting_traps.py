"""What other counters get wrong: each of these once made a published figure false."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cost_models import image, on_meta
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite import analyze, convert
from attnrewrite.algebra.site_formula import PAIRS
from attnrewrite.errors import ArgumentError, CaptureError
from attnrewrite.functional import neighborhood_attention
from attnrewrite.hosts.loading import load_model
from attnrewrite.models import create_model

VIT_S, SWIN_T = 4_598_882_304, 4_490_566_656


def small_vit(**options):
    options = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 10,
    } | options
    return load_model("timm:vit_tiny_patch16_224", **options).eval()


def small_crossformer():
    model = create_model("crossformer_tiny", depths=(2, 1, 1, 1), embed_dim=32, num_heads=(1, 2, 4, 8), num_classes=10)
    return model.eval()


def flops_on_meta(model, shape) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


class Attending(nn.Module):
    """torch's own modules, which take a fused path of no countable operation in eval mode without gradients."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, pixels):
        return self.encoder(self.embed(pixels).flatten(2).transpose(1, 2))


def test_fused_attention_and_the_fast_path_on_a_cpu_are_counted():
    model = Attending().eval()
    tokens = 16
    expected = tokens * 3 * 64 * 32 + 4 * tokens * 32**2 + 2 * tokens**2 * 32 + 2 * tokens * 32 * 64
    with torch.no_grad():
        assert analyze(model, torch.zeros(1, 3, 32, 32)).total == expected
    assert analyze(model, torch.zeros(1, 3, 32, 32)).total == expected


def test_same_count_for_fused_and_eager_attention():
    fused, eager = small_vit(), small_vit()
    for block in eager.blocks:
        block.attn.fused_attn = False
    assert analyze(fused).total == analyze(eager).total == flops_on_meta(fused, (1, 3, 64, 64)) // 2


def test_same_count_in_transformers_with_either_implementation():
    transformers = pytest.importorskip("transformers")  # an extra
    config = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 64,
    }
    counts = set()
    for implementation in ("sdpa", "eager"):
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**config, attn_implementation=implementation)
        )
        counts.add(analyze(model.eval()).total)
    same = small_vit(mlp_ratio=2, num_classes=2)
    assert counts == {analyze(same).total}


def test_same_count_for_one_architecture_in_three_libraries():
    swins = [on_meta("timm:swin_tiny_patch4_window7_224"), on_meta("torchvision:swin_t")]
    assert {analyze(model, image(224)).total for model in swins} == {SWIN_T}
    vits = [on_meta("timm:vit_base_patch16_224"), on_meta("torchvision:vit_b_16")]
    vits.append(on_meta("transformers:ViTForImageClassification", num_labels=1000))
    assert {analyze(model, image(224)).total for model in vits} == {17_563_828_224}


class Neighborhood(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.embed, self.backend = nn.Conv2d(3, 32, 4, 4), backend

    def forward(self, pixels):
        maps = self.embed(pixels).permute(0, 2, 3, 1).unflatten(-1, (4, 8))
        return neighborhood_attention(maps, maps, maps, 5, backend=self.backend)


def test_same_count_for_every_backend():
    counts = {analyze(Neighborhood(name), torch.zeros(1, 3, 40, 56)).total for name in (None, "reference", "tiled")}
    assert counts == {10 * 14 * 32 * 3 * 16 + 2 * 10 * 14 * 25 * 32}


@pytest.mark.parametrize(("target", "options"), [("identity", {}), ("neighborhood", {"kernel_size": 3})])
def test_outside_counters_agree_on_converted_models(target, options):
    model = convert(small_vit(), to=target, progress=False, **options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    tokens, prefix = 17, 1
    missed = tokens**2 if target == "identity" else prefix * tokens  # dense attention on a CPU, per block and channel
    assert analyze(model).total == counter.get_total_flops() // 2 + 2 * 2 * missed * 48


def test_distilled_and_register_tokens():
    assert analyze(on_meta("timm:deit_base_distilled_patch16_224"), image(224)).total == 17_656_811_520
    model = small_vit(reg_tokens=4, img_size=(64, 48))
    report = analyze(model)
    assert report.total == flops_on_meta(model, (1, 3, 64, 48)) // 2
    attention = next(site for site in report.sites if site.kind == "SA")
    assert attention.formula.in_pixels(attention.formula.values[next(iter(attention.formula.values))]).free_symbols
    assert all(check.equal for check in report.checks)


@pytest.mark.parametrize("side", [56, 60, 50])
def test_position_networks_where_the_pooling_does_not_divide(side):
    from attnrewrite.algebra.symbols import count_offsets
    from attnrewrite.modules.log_cpb import _offset_range

    for cells in (7, 8, side // 8):
        furthest, step = _offset_range(side, cells)
        assert count_offsets(side, cells) <= 2 * furthest // step + 1
    known = {(14, 7): 26, (28, 7): 52, (56, 7): 104, (15, 7): 27, (24, 7): 75, (50, 7): 92}
    assert {pair: count_offsets(*pair) for pair in known} == known


@pytest.mark.slow
def test_groups_at_the_border_count_with_the_tokens_they_have():
    """At 240 pixels the first stage's 60 x 60 map is no multiple of groups of 7, nor of regions of 56."""
    report = analyze(small_crossformer(), torch.zeros(1, 3, 240, 240))
    assert all(check.equal for check in report.checks)
    sites = {site.name: site for site in report.sites}
    short, long = 8 * 7**2 + 4**2, 8 * 7**2 + 4 * 1**2
    for name, pairs in (("layers.0.blocks.0.attn", short), ("layers.0.blocks.1.attn", long)):
        formula = sites[name].formula
        assert formula.number(PAIRS, 240, 240) == pairs**2
        assert sites[name].macs == formula.macs_of(1, 240, 240)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini"])
def test_maps_smaller_than_the_kernel(name):
    """At 256 x 192 the last stage's map is 8 x 6, and the kernel 7."""
    report = analyze(create_model(name).eval(), torch.zeros(1, 3, 256, 192))
    assert all(check.equal for check in report.checks)
    assert report.assumptions == []


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.block.weight

    def forward(self, pixels):
        tokens = self.embed(pixels).flatten(2).transpose(1, 2)
        return self.tied(self.block(self.block(tokens)))


def test_shared_modules_count_each_call_and_their_parameters_once():
    report = analyze(Shared(), torch.zeros(1, 3, 32, 32))
    assert report.total == 16 * (192 * 16 + 3 * 16 * 16)
    assert report.parameters.total == 192 * 16 + 16 + 16 * 16 + 2 * 16
    assert next(module.calls for module in report.modules if module.name == "block") == 2


def test_batch_multiplies_all_but_the_position_networks():
    vit = analyze(small_vit())
    assert vit.at(64, 64, batch=7).macs == 7 * vit.total
    report = analyze(small_crossformer(), torch.zeros(2, 3, 112, 112))
    once = report.formula.macs(0, 112, 112)
    networks = ((2, 1, 7), (2, 1, 7), (4, 2, 7), (8, 4, 7), (16, 8, 4))  # width, heads, group: a 4 x 4 map is one
    expected = sum((2 * g - 1) ** 2 * (2 * e + 2 * e**2 + e * h) for e, h, g in networks)
    assert once == expected
    assert report.total == report.at(112, 112, batch=2).macs == 2 * (report.at(112, 112, batch=1).macs - once) + once


@torch.library.custom_op("attnrewrite_tests::unknown_mixing", mutates_args=())
def unknown_mixing(source: torch.Tensor) -> torch.Tensor:
    return source @ source.transpose(-1, -2) @ source


@unknown_mixing.register_fake
def _(source):
    return torch.empty_like(source)


class Mixer(nn.Module):
    def forward(self, tokens):
        return unknown_mixing(tokens)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mixer = nn.Conv2d(3, 16, 8, 8), Mixer()

    def forward(self, pixels):
        return self.mixer(self.embed(pixels).flatten(2).transpose(1, 2))


def test_an_operation_without_a_price_is_listed_with_its_place_and_shape():
    report = analyze(Unknown(), torch.zeros(1, 3, 32, 32))
    assert [str(found) for found in report.unsupported] == ["attnrewrite_tests::unknown_mixing in mixer on 1x16x16"]
    assert "not counted: attnrewrite_tests::unknown_mixing in mixer on 1x16x16" in str(report)
    assert not analyze(small_vit()).unsupported


def test_elementwise_attention_is_no_silent_zero():
    """Products written as multiply and sum are elementwise work, and shown as such."""

    class Spelled(nn.Module):
        def forward(self, pixels):
            return (pixels[..., None, :] * pixels[..., None]).sum(-1)

    report = analyze(Spelled(), torch.zeros(1, 3, 8, 8))
    assert report.total == 0
    assert report.cost.elementwise == 2 * 3 * 8 * 8 * 8


def test_total_and_trainable_parameters():
    model = small_vit()
    model.pos_embed.requires_grad_(False)
    found = analyze(model).parameters
    assert found.total - found.trainable == model.pos_embed.numel()


def test_sizes_that_the_model_refuses_are_answered_and_flagged():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4)

        def forward(self, pixels):
            if tuple(pixels.shape[-2:]) != (32, 32):
                raise ValueError("only 32x32")
            return self.head(self.embed(pixels).mean((2, 3)))

    report = analyze(Fixed(), torch.zeros(1, 3, 32, 32))
    assert not report.at(32, 32).extrapolated
    found = report.at(64, 40)
    assert found.extrapolated
    assert found.macs == 8 * 5 * 192 * 16 + 16 * 4
    assert any("takes no size but 32x32" in note for note in report.assumptions)
    resizable = analyze(small_vit())
    assert not resizable.at(96, 64).extrapolated


def test_a_size_that_the_model_does_not_take_says_which_it_takes():
    with pytest.raises(ArgumentError, match=r"rejects 80x80 .* analyze it at 64x64"):
        analyze(small_vit(), torch.zeros(1, 3, 80, 80))


def test_costs_that_depend_on_values_are_refused():
    class Sparse(nn.Module):
        def forward(self, pixels):
            return pixels[pixels > 0.5] @ torch.ones(1)

    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, pixels):
            return self.layer(pixels) if pixels.mean().item() > 0 else pixels

    for model in (Sparse(), Adaptive()):
        with pytest.raises(CaptureError, match="on shapes alone"):
            analyze(model, torch.zeros(1, 3, 8, 8))


def test_grouped_and_transposed_convolutions_forward_and_backward():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, 2, 1)
            self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
            self.up = nn.ConvTranspose2d(16, 4, 2, 2)

        def forward(self, pixels):
            return F.relu(self.up(self.depthwise(self.first(pixels))))

    report = analyze(Convolutions(), torch.zeros(1, 3, 32, 32))
    first, depthwise, up = 256 * 27 * 16, 256 * 25 * 16, 256 * 16 * 4 * 4
    assert report.total == first + depthwise + up
    assert report.training.backward == first + 2 * (depthwise + up)  # the image needs no gradient
