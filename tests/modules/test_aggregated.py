"""Aggregated and length-scaled cosine attention: the equations pixel by pixel, every switch, sizes, precision."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export

from attnrewrite.errors import ArgumentError
from attnrewrite.modules.adaptive_pool import adaptive_average
from attnrewrite.modules.aggregated import AggregatedAttention
from attnrewrite.modules.cosine_attention import CosineAttention
from attnrewrite.modules.log_cpb import log_cpb, resample_bias

PIXEL_FOCUSED = {"qk_norm": False, "length_scale": False, "query_embedding": False, "learnable_tokens": False}


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def reference(module, source, local_mask=None):
    """The specification, one query at a time: a list of keys with their biases, then one softmax."""
    batch, height, width, dim = source.shape
    heads, window = module.num_heads, module.window_size
    split = lambda part: part.unflatten(-1, (heads, -1))  # noqa: E731 - used twice, here alone
    unit = (lambda part: part / part.norm(dim=-1, keepdim=True)) if module.qk_norm else (lambda part: part)
    query = unit(split(module.q(source)))
    key, value = (split(part) for part in module.kv(source).chunk(2, -1))
    pooled = None
    if module.pool:
        pooled = module.reducer(source) if module.reducer is not None else own_reduction(module, source)
        pool_key, pool_value = (split(part).flatten(1, 2) for part in module.kv(pooled).chunk(2, -1))
        bias = module.position_bias((height, width), tuple(pooled.shape[1:3]))
    result = torch.zeros(batch, height, width, heads, dim // heads, dtype=source.dtype)
    for y in range(height):
        for x in range(width):
            places = [
                (o, y + o // window - window // 2, x + o % window - window // 2)
                for o in range(window**2)
                if local_mask is None or local_mask[y * width + x, o]
            ]
            places = [(o, i, j) for o, i, j in places if 0 <= i < height and 0 <= j < width]
            offsets = [o for o, _, _ in places]
            keys = torch.stack([key[:, i, j] for _, i, j in places], 1)
            values = torch.stack([value[:, i, j] for _, i, j in places], 1)
            added = module.relative_pos_bias_local[:, offsets]
            if pooled is not None:
                keys, values = torch.cat([keys, pool_key], 1), torch.cat([values, pool_value], 1)
                extra = torch.zeros(heads, pool_key.shape[1]) if bias is None else bias[:, y * width + x]
                added = torch.cat([added, extra], -1)
            embedded = query[:, y, x]
            if module.query_embedding is not None:
                embedded = embedded + module.query_embedding[:, 0]
            scale = module.scale if module.scale is not None else F.softplus(module.temperature[:, 0, 0])[:, None]
            scores = torch.einsum("bhd,bkhd->bhk", embedded, unit(keys)) * scale
            weights = (scores * (math.log(keys.shape[1]) if module.length_scale else 1) + added).softmax(-1)
            if module.learnable_tokens is not None:
                tokens = torch.einsum("bhd,hdk->bhk", query[:, y, x], module.learnable_tokens[..., offsets])
                tokens = tokens + module.learnable_bias[:, 0, offsets]
                weights = weights + F.pad(tokens, (0, keys.shape[1] - len(places)))
            result[:, y, x] = torch.einsum("bhk,bkhd->bhd", weights, values)
    return module.proj(result.flatten(-2))


def own_reduction(module, source):
    activated = F.gelu(F.linear(source, module.sr.weight[:, :, 0, 0], module.sr.bias)).permute(0, 3, 1, 2)
    height, width = source.shape[1:3]
    cells = module.pool_size or tuple(
        max(side // ratio, 1) for side, ratio in zip((height, width), module.sr_ratio, strict=True)
    )
    return module.norm(F.adaptive_avg_pool2d(activated, cells).permute(0, 2, 3, 1))


OPTIONS = {
    "official": {"sr_ratio": 2, "pretrain_size": 7},
    "uneven": {"sr_ratio": 3, "window_size": 5},
    "fixed pool": {"pool_size": (2, 3), "pretrain_size": (4, 9)},
    "pixel focused": {"sr_ratio": 2, "scale": 0.3, **PIXEL_FOCUSED},
    "fixed scale": {"sr_ratio": 2, "scale": 3.0, "position_bias": False, "qkv_bias": False},
    "window only": {"pool": False, "window_size": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [(5, 8), (1, 1), (6, 6), (2, 7)], ids=str)
def test_equals_the_specification(options, size):
    module = randomized(AggregatedAttention(12, 3, **options))
    source = torch.randn(2, *size, 12, dtype=torch.float64)
    assert (module(source) - reference(module, source)).abs().max() < 1e-11


def test_a_strided_convolution_as_reducer():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, 3), nn.LayerNorm(8)

        def forward(self, source):
            return self.norm(self.conv(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    reducer = Strided()
    before = copy.deepcopy(reducer.state_dict())
    module = AggregatedAttention(8, 2, reducer=reducer)
    assert all(torch.equal(part, before[name]) for name, part in reducer.state_dict().items())
    module = randomized(module)
    source = torch.randn(1, 7, 10, 8, dtype=torch.float64)
    assert (module(source) - reference(module, source)).abs().max() < 1e-11


def test_without_the_window_it_is_attention_to_the_pooled_map():
    module = AggregatedAttention(8, 2, reducer=nn.Identity(), scale=0.5, position_bias=False, **PIXEL_FOCUSED).double()
    nn.init.constant_(module.relative_pos_bias_local, -math.inf)
    source = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    query, key, value = (
        part.unflatten(-1, (2, 4)).flatten(1, 2).transpose(1, 2)
        for part in (module.q(source), *module.kv(source).chunk(2, -1))
    )
    dense = F.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2).flatten(2)
    output = module(source)
    assert (output.flatten(1, 2) - module.proj(dense)).abs().max() < 1e-12
    output.sum().backward()
    assert source.grad.isfinite().all()
    assert not module.relative_pos_bias_local.grad.any()


def test_a_mask_removes_places_before_and_after_the_softmax():
    module = randomized(AggregatedAttention(12, 3, pool=False))
    mask = torch.rand(30, 9) < 0.5
    mask[:, 4] = True
    source = torch.randn(1, 5, 6, 12, dtype=torch.float64)
    assert (module(source, local_mask=mask) - reference(module, source, mask)).abs().max() < 1e-11


def test_prefix_tokens_are_keys_of_all_and_see_all():
    """With the window off and the map not pooled, prefix and map together are one dense sequence."""
    module = AggregatedAttention(8, 2, reducer=nn.Identity(), scale=0.5, position_bias=False, **PIXEL_FOCUSED).double()
    nn.init.constant_(module.relative_pos_bias_local, -math.inf)
    source, prefix = (torch.randn(2, *size, 8, dtype=torch.float64) for size in ((3, 4), (2,)))
    sequence = torch.cat([prefix, source.flatten(1, 2)], 1)
    query, key, value = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (module.q(sequence), *module.kv(sequence).chunk(2, -1))
    )
    dense = module.proj(F.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2).flatten(2))
    pixels, tokens = module(source, prefix)
    assert (torch.cat([tokens, pixels.flatten(1, 2)], 1) - dense).abs().max() < 1e-12


def test_a_prefix_counts_as_keys_in_the_length_scale():
    module = randomized(AggregatedAttention(8, 2, pool=False, learnable_tokens=False))
    nn.init.zeros_(module.kv.weight)  # all keys alike: the scores, and not the weights, tell the scale
    nn.init.zeros_(module.relative_pos_bias_local)
    seen = []
    scaled_query = module.scaled_query
    module.scaled_query = lambda unit, count: seen.append(count.tolist()) or scaled_query(unit, count)
    module(torch.randn(1, 3, 3, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64))
    assert seen == [[9, 11, 9, 11, 14, 11, 9, 11, 9], [14]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 17), st.integers(1, 13), st.data())
def test_pooling_and_position_bias_at_any_size(height, width, data):
    cells = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    source = torch.randn(2, height, width, 3, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(source.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1)
    assert (adaptive_average(source, cells) - expected).abs().max() < 1e-12
    fc1, fc2 = nn.Linear(2, 8).double(), nn.Linear(8, 2).double()
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).double()
    centers = F.adaptive_avg_pool2d(places.permute(2, 0, 1), cells).permute(1, 2, 0)
    unit = torch.tensor([max(5 - 1, 1), max(1 - 1, 1)])  # a side of 1 in pretraining divides by 1, not by 0
    offset = 8 * (places.flatten(0, 1)[:, None] - centers.flatten(0, 1)) / unit
    pairs = fc2(fc1(offset.sign() * (1 + offset.abs()).log2() / 3).relu()).permute(2, 0, 1)
    assert (log_cpb(fc1, fc2, (height, width), cells, (5, 1)) - pairs).abs().max() < 1e-12
    new = (height + 3, max(width - 2, 1)), (cells[0], cells[1] + 2)
    by_cell = F.interpolate(pairs.unflatten(2, cells), size=new[1], mode="bilinear").flatten(2)
    by_pixel = F.interpolate(by_cell.mT.unflatten(2, (height, width)), size=new[0], mode="bilinear").flatten(2).mT
    assert (resample_bias(pairs, (height, width), cells, *new) - by_pixel).abs().max() < 1e-12


@pytest.mark.parametrize(
    "module",
    [
        AggregatedAttention(4, 2, sr_ratio=2, pretrain_size=3),
        AggregatedAttention(4, 2, sr_ratio=2, pretrain_size=3, interpolate_bias=True),
        CosineAttention(4, 2),
    ],
    ids=["aggregated", "resampled", "cosine"],
)
def test_gradients(module):
    module = randomized(module)
    source = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    module.cpb_fc1.requires_grad_(False)  # 1024 weights would take long, and ReLU has a corner
    parameters = {name: part for name, part in module.named_parameters() if part.numel() < 40 and part.requires_grad}

    def function(source, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (source,))

    assert torch.autograd.gradcheck(function, (source, *parameters.values()))


EXPORTS = {
    "by ratio": AggregatedAttention(8, 2, sr_ratio=2),
    "fixed pool": AggregatedAttention(8, 2, pool_size=3, window_size=5, pretrain_size=9),
    "resampled": AggregatedAttention(8, 2, sr_ratio=2, pretrain_size=8, interpolate_bias=True),
    "cosine": CosineAttention(8, 2),
}


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(module, id=name, marks=[pytest.mark.slow] if name in ("fixed pool", "resampled") else [])
        for name, module in EXPORTS.items()
    ],
)
def test_export_runs_at_other_sizes(module):
    module = module.eval()
    dims = {0: Dim("B", max=64), 1: Dim("H", min=4, max=128), 2: Dim("W", min=4, max=128)}
    exported = export(module, (torch.randn(2, 8, 13, 8),), dynamic_shapes=(dims,)).module()
    for size in ((1, 5, 16), (3, 12, 4), (2, 9, 9)):
        source = torch.randn(*size, 8)
        assert (exported(source) - module(source)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [lambda: AggregatedAttention(16, 2, sr_ratio=2), lambda: CosineAttention(16, 2)])
def test_half_precision_is_near_and_finite(build, dtype):
    module = build()
    source = torch.randn(2, 6, 7, 16)
    expected = module(source)
    half = copy.deepcopy(module).to(dtype)
    for zeroed in (False, True):
        given_source = (source * (not zeroed)).to(dtype).requires_grad_()
        output = half(given_source)
        output.float().square().sum().backward()
        assert given_source.grad.isfinite().all()
        assert all(part.grad.isfinite().all() for part in half.parameters())
        if not zeroed:
            assert (output.float() - expected).abs().max() < 0.03 * max(1, expected.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(source)
    assert (mixed.float() - expected).abs().max() < 0.03 * max(1, expected.abs().max())


CHANGES = {
    "in place": lambda module: module.cpb_fc2.weight.mul_(3),
    "through data": lambda module: module.cpb_fc2.weight.data.mul_(3),
    "new data": lambda module: setattr(module.cpb_fc1.weight, "data", module.cpb_fc1.weight * 3),
    "state dict": lambda module: module.load_state_dict({n: p * 2 for n, p in module.state_dict().items()}),
    "dtype": lambda module: module.double(),
    "replaced": lambda module: setattr(module, "cpb_fc2", nn.Linear(512, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_kept_bias_is_never_stale(change):
    module = AggregatedAttention(8, 2, sr_ratio=2).eval()
    source = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        module(source)
        change(module)
        source = source.to(module.q.weight.dtype)
        kept = module(source)
        with torch.enable_grad():
            fresh = module(source)
    assert torch.equal(kept, fresh.detach())


def test_the_bias_is_kept_without_gradients_only_and_not_copied():
    module = AggregatedAttention(8, 2, sr_ratio=2).eval()
    source, passes = torch.randn(1, 6, 8, 8), []
    module.cpb_fc2.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        module(source), module(source), module(source.transpose(1, 2))
    assert len(passes) == 2
    module(source), module(source)
    assert len(passes) == 4
    del module.cpb_fc2._forward_hooks[next(iter(module.cpb_fc2._forward_hooks))]
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)]
    with torch.no_grad():
        expected = module(source)
        assert all(torch.equal(one(source), expected) for one in copies)
        copies[0].cpb_fc2.weight.mul_(5)
        assert not torch.equal(copies[0](source), expected)
        assert torch.equal(module(source), expected)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"num_heads": 5, "sr_ratio": 2}, "num_heads"),
        ({"window_size": 4, "sr_ratio": 2}, "window_size"),
        ({"sr_ratio": 2, "pool_size": 3}, "sr_ratio, pool_size"),
        ({}, "sr_ratio, pool_size"),
        ({"sr_ratio": 0}, "sr_ratio"),
        ({"pool": False, "sr_ratio": 2}, "sr_ratio"),
        ({"reducer": nn.Identity(), "pool_size": 2}, "pool_size"),
        ({"reducer": nn.Identity(), "pretrain_size": 4, "interpolate_bias": True}, "interpolate_bias"),
        ({"sr_ratio": 2, "interpolate_bias": True}, "pretrain_size"),
        ({"sr_ratio": 2, "pretrain_size": 0}, "pretrain_size"),
    ],
)
def test_arguments_without_meaning(options, argument):
    with pytest.raises(ArgumentError, match=f"^{argument}:"):
        AggregatedAttention(8, **{"num_heads": 2, **options})


def test_masks_without_meaning():
    module = AggregatedAttention(8, 2, pool=False)
    source = torch.randn(1, 3, 4, 8)
    for mask in (torch.ones(12, 25, dtype=torch.bool), torch.ones(12, 9)):
        with pytest.raises(ArgumentError, match=r"local_mask: must be \(12, 9\), torch.bool"):
            module(source, local_mask=mask)
    with pytest.raises(ArgumentError, match="without a key"):
        module(source, local_mask=torch.zeros(12, 9, dtype=torch.bool))
