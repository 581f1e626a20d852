"""The stem of T2T-ViT against unfolded patches, and what it never builds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from attnrewrite.errors import ArgumentError
from attnrewrite.modules.patch_projection import project_patches
from attnrewrite.modules.token_layers import TokenPerformer, TokenTransformer
from attnrewrite.modules.tokens_to_token import TokensToToken, resample_positions, sinusoid_table
from attnrewrite.operators.soft_split import PatchGrid

KINDS = pytest.mark.parametrize("kind", ["transformer", "performer"])


def randomized(module):
    for name, part in module.named_parameters():
        if not name.endswith(".w"):
            part.data.add_(0.2 * torch.randn_like(part))
    return module.eval()


def stem(kind="performer", **options):
    return randomized(TokensToToken(**{"embed_dim": 20, "kind": kind, "token_dims": (12, 16), **options}))


def unfolded(module, image):
    """The stem as the paper writes it: three times the patches of the map, gathered."""
    for layer, patches in ((module.attention1, (7, 4, 2)), (module.attention2, (3, 2, 1)), (None, (3, 2, 1))):
        kernel_size, stride, padding = patches
        height, width = ((side + 2 * padding - kernel_size) // stride + 1 for side in image.shape[-2:])
        tokens = F.unfold(image, kernel_size, padding=padding, stride=stride).transpose(1, 2)
        tokens = module.project(tokens) if layer is None else layer(tokens)
        image = tokens.transpose(1, 2).unflatten(2, (height, width))
    return image.permute(0, 2, 3, 1)


@KINDS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (19, 50), (3, 7)])
def test_equals_the_unfolded_stem_with_its_gradients(kind, normalize, size):
    module = stem(kind, normalize=normalize, in_chans=2).double()
    image = torch.rand(2, 2, *size, dtype=torch.float64, requires_grad=True)
    found, expected = module(image), unfolded(module, image)
    assert found.shape[1:3] == TokensToToken.grid(*size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    wanted = [image, *(part for part in module.parameters() if part.requires_grad)]
    weight = torch.randn_like(found)
    gradients = (torch.autograd.grad((result * weight).sum(), wanted) for result in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@given(st.integers(3, 40), st.integers(3, 40), st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_projection_of_any_patches(height, width, channels, kernel_size, stride, data):
    padding = data.draw(st.integers(0, kernel_size // 2))
    if min(height, width) + 2 * padding < kernel_size:
        return
    dim = channels * kernel_size**2
    norm, linear = randomized(torch.nn.LayerNorm(dim)).double(), torch.nn.Linear(dim, 5).double()
    image = torch.randn(2, channels, height, width, dtype=torch.float64)
    tokens = F.unfold(image, kernel_size, padding=padding, stride=stride).transpose(1, 2)
    for own in (norm, torch.nn.Identity()):
        found = project_patches(image, own, linear, PatchGrid(kernel_size, stride, padding)).flatten(1, 2)
        torch.testing.assert_close(found, linear(own(tokens)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("brightness", [0.0, 1e2, 1e4])
def test_float32_holds_where_the_contrast_is_far_below_the_brightness(brightness):
    """Without the shift the variance of the brightest patches would be lost entirely."""
    norm, linear = torch.nn.LayerNorm(147), torch.nn.Linear(147, 8)
    image = brightness + torch.randn(1, 3, 40, 40)
    found = project_patches(image, norm, linear, PatchGrid(7, 4, 0)).flatten(1, 2)
    tokens = F.unfold(image.double(), 7, stride=4).transpose(1, 2)
    expected = linear.double()(norm.double()(tokens))
    assert (found - expected).abs().max() < 1e-3


def test_a_flat_image_has_finite_gradients():
    module, image = stem("transformer"), torch.full((1, 3, 32, 32), 0.7, requires_grad=True)
    module(image).square().sum().backward()
    assert image.grad.isfinite().all()
    assert all(part.grad.isfinite().all() for part in module.parameters())


class Largest(TorchDispatchMode):
    """The most values of any tensor that an operation returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.values = max(self.values, part.numel())
        return result


@KINDS
@pytest.mark.parametrize("normalize", [True, False])
def test_the_patches_are_never_gathered(kind, normalize):
    """With narrow tokens nothing outgrows the padded image, which the patches of either level do threefold."""
    module = stem(kind, normalize=normalize, token_dims=(4, 4))
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    padded, gathered = 3 * (132 if normalize else 128) ** 2, 147 * 32 * 32
    with Largest() as largest:
        module(image).sum().backward()
    assert largest.values == padded
    with Largest() as largest:
        unfolded(module, image)
    assert largest.values >= gathered


def test_patches_of_wide_maps_are_not_gathered_either():
    linear, patches = torch.nn.Linear(9 * 64, 2), PatchGrid(3, 2, 1)
    with Largest() as largest:
        project_patches(torch.randn(1, 64, 16, 16), torch.nn.LayerNorm(9 * 64), linear, patches)
    assert largest.values == 64 * 18 * 18  # the padded map; its patches are 64 * 9 * 8 * 8 values


def test_attention_weights_are_not_stored():
    module = stem("transformer", token_dims=(4, 4))
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    with Largest() as largest:
        module(image).sum().backward()
    assert largest.values < (40 * 40) ** 2 / 10


@KINDS
def test_without_norms_the_stem_can_be_linear_in_the_image(kind):
    """A bypassed attention and MLP leave the value: with norms it ignores contrast, without them it scales."""

    def contrast(normalize):
        module = stem(kind, normalize=normalize).double()
        for layer in (module.attention1, module.attention2):
            attention = layer if kind == "performer" else layer.attn
            for linear in (attention.proj, layer.mlp[2] if kind == "performer" else layer.mlp.fc2):
                linear.weight.data.zero_()
                linear.bias.data.zero_()
            if kind == "performer":
                layer.kqv.bias.data.zero_()
        module.project.bias.data.zero_()
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        return module(2 * image), module(image)

    double, single = contrast(normalize=False)
    torch.testing.assert_close(double, 2 * single)
    double, single = contrast(normalize=True)
    torch.testing.assert_close(double, single, rtol=1e-3, atol=1e-3)  # up to the norm's epsilon


def test_the_performer_estimates_the_damped_kernel():
    """Its features' mean over many draws is exp(q.k / 2 - |q|^2 / 4 - |k|^2 / 4), not exp(q.k - ...)."""
    direction = F.normalize(torch.randn(64, dtype=torch.float64), dim=0)
    query, key = 1.2 * direction[None, None], -0.8 * direction[None, None]
    layers = [TokenPerformer(3, 64).double() for _ in range(300)]
    kernel = torch.stack([(layer._features(query) * layer._features(key)).sum() for layer in layers]).mean().item()
    norms = 1.2**2 + 0.8**2
    assert kernel == pytest.approx(math.exp(-1.2 * 0.8 / 2 - norms / 4), rel=0.03)
    assert kernel != pytest.approx(math.exp(-1.2 * 0.8 - norms / 2), rel=0.05)


@pytest.mark.parametrize("layer", [TokenTransformer, TokenPerformer])
def test_gradcheck(layer):
    module = randomized(layer(6, 4)).double()
    tokens = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (tokens,))


def test_the_default_scale_is_of_the_wide_input():
    layer = TokenTransformer(147, 64)
    assert layer.attn.scale == 147**-0.5


@KINDS
def test_export_with_any_batch_and_size(kind):
    module = stem(kind)
    sizes = ({0: Dim("batch", max=64), 2: Dim.AUTO, 3: Dim.AUTO},)
    exported = torch.export.export(module, (torch.randn(2, 3, 64, 96),), dynamic_shapes=sizes).module()
    for size in [(64, 96), (75, 50)]:
        image = torch.randn(3, 3, *size)
        torch.testing.assert_close(exported(image), module(image), rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(kind, dtype):
    module, image = stem(kind), torch.randn(2, 3, 64, 48)
    expected = module(image).detach()
    with torch.autocast("cpu", dtype):
        assert (module(image) - expected).norm() / expected.norm() < 0.03
    found = module.to(dtype)(image.to(dtype))
    found.float().square().sum().backward()
    assert found.dtype == dtype
    assert (found - expected).norm() / expected.norm() < 0.03
    assert all(part.grad.isfinite().all() for part in module.parameters() if part.requires_grad)


def test_sinusoids():
    table = sinusoid_table(50, 6)
    assert table.dtype == torch.float64
    position, channel = 37, 4
    angle = position / 10000 ** (4 / 6)
    assert table[position, channel] == pytest.approx(math.sin(angle), abs=1e-14)
    assert table[position, channel + 1] == pytest.approx(math.cos(angle), abs=1e-14)


def test_resampled_positions_of_the_same_map_keep_every_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        positions = torch.randn(1, 1 + 5 * 7, 6, dtype=dtype)
        assert torch.equal(resample_positions(positions, (5, 7), (5, 7)), positions)


def test_resampled_positions_lie_on_the_map():
    """Row and column as codes say where a token is read: at its center, but near the border and for the small ripple
    of the cubic. The class token keeps its own."""
    rows, columns = torch.arange(8.0)[:, None], torch.arange(12.0)
    codes = torch.stack([rows + 0 * columns, columns + 0 * rows], dim=-1).flatten(0, 1)
    positions = torch.cat([torch.full((1, 2), 99.0), codes]).unsqueeze(0)
    found = resample_positions(positions, (8, 12), (16, 36))
    torch.testing.assert_close(found[:, 0], positions[:, 0])
    inner = found[0, 1:].unflatten(0, (16, 36))[4:-4, 6:-6]
    row, column = (torch.arange(4, 12) + 0.5) / 2 - 0.5, (torch.arange(6, 30) + 0.5) / 3 - 0.5
    torch.testing.assert_close(inner[..., 0], row[:, None].expand(8, 24), rtol=0, atol=0.06)
    torch.testing.assert_close(inner[..., 1], column.expand(8, 24), rtol=0, atol=0.06)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_positions_in_half_precision_are_resampled_in_float32(dtype):
    positions = torch.randn(1, 1 + 4 * 4, 6, dtype=dtype)
    found = resample_positions(positions, (4, 4), (7, 5))
    assert found.dtype == dtype
    assert torch.equal(found, resample_positions(positions.float(), (4, 4), (7, 5)).to(dtype))


def test_positions_of_another_map_are_refused():
    with pytest.raises(ArgumentError, match="4 x 6 have 25 of them, got 17"):
        resample_positions(torch.randn(1, 17, 6), (4, 6), (8, 8))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "perfomer"}, "did you mean 'performer'"),
        ({"kind": "convolution"}, "kind"),
        ({"token_dims": (64,)}, "token_dims"),
        ({"token_dims": (64, 0)}, "token_dims"),
    ],
)
def test_bad_arguments(options, reason):
    with pytest.raises(ArgumentError, match=reason):
        TokensToToken(**options)


def test_an_image_below_one_patch_is_refused():
    with pytest.raises(ArgumentError, match="at least 3 pixels"):
        stem()(torch.randn(1, 3, 2, 40))
