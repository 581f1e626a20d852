"""The gated unit with a depthwise convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim, export

from attnrewrite.errors import ArgumentError
from attnrewrite.lowering import use_backend
from attnrewrite.modules.conv_glu import ConvGLU, gated_width


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7))
def test_equals_its_equation(height, width):
    module = randomized(ConvGLU(5, 6, 4))
    source = torch.randn(2, height, width, 5, dtype=torch.float64)
    projected = F.linear(source, module.fc1.weight, module.fc1.bias)
    gate = F.pad(projected[..., :6], (0, 0, 1, 1, 1, 1))
    taps = module.dwconv.dwconv.weight[:, 0]
    mixed = module.dwconv.dwconv.bias + sum(
        gate[:, y : y + height, x : x + width] * taps[:, y, x] for y in range(3) for x in range(3)
    )
    expected = F.linear(F.gelu(mixed) * projected[..., 6:], module.fc2.weight, module.fc2.bias)
    assert (module(source) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_holds_an_mlp_of_its_width_bit_for_bit(dtype):
    """A value of constant 1, and a convolution that is the identity (width kept, not two thirds)."""
    fc1, fc2 = nn.Linear(12, 24, dtype=dtype), nn.Linear(24, 12, dtype=dtype)
    module = ConvGLU(12, 24).to(dtype)
    with torch.no_grad():
        module.fc1.weight.copy_(torch.cat([fc1.weight, torch.zeros_like(fc1.weight)]))
        module.fc1.bias.copy_(torch.cat([fc1.bias, torch.ones_like(fc1.bias)]))
        for parameter in module.dwconv.parameters():
            parameter.zero_()
        module.dwconv.dwconv.weight[:, 0, 1, 1] = 1
    module.fc2 = fc2
    source = torch.randn(1, 4, 5, 12, dtype=dtype)
    with use_backend("plain"):  # kernels round a GELU in their own way
        assert torch.equal(module(source), fc2(F.gelu(fc1(source))))
    torch.testing.assert_close(module(source), fc2(F.gelu(fc1(source))))


def test_the_activations_of_the_source_are_carried():
    module = randomized(ConvGLU(4, 6, activation="silu", pre_activation="relu"))
    source = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    gate, value = module.fc1(source).chunk(2, -1)
    mixed = module.dwconv.dwconv(gate.relu().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert (module(source) - module.fc2(F.silu(mixed) * value)).abs().max() < 1e-12


def test_gradients():
    module = randomized(ConvGLU(3, 2))
    source = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda source, *_: module(source), (source, *module.parameters()))


def test_dropout_acts_before_and_after_the_last_map():
    module = ConvGLU(8, 16, dropout=0.5)
    nn.init.ones_(module.fc2.bias)
    source = torch.randn(1, 10, 10, 8)
    dropped = module(source)
    assert 0.3 < (dropped == 0).float().mean() < 0.7  # after
    kept = dropped != 0
    assert not torch.allclose(dropped[kept], 2 * module.eval()(source)[kept])  # and before


def test_export_runs_at_other_sizes():
    module = ConvGLU(6, 8).eval()
    dims = {0: Dim("B", max=64), 1: Dim("H", max=128), 2: Dim("W", max=128)}
    exported = export(module, (torch.randn(2, 8, 13, 6),), dynamic_shapes=(dims,)).module()
    source = torch.randn(3, 5, 4, 6)
    assert torch.allclose(exported(source), module(source), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite(dtype):
    module = ConvGLU(8, 16).to(dtype)
    source = torch.randn(2, 5, 5, 8, dtype=dtype, requires_grad=True)
    module(source).float().square().sum().backward()
    assert source.grad.isfinite().all()
    assert all(part.grad.isfinite().all() for part in module.parameters())


def test_official_widths():
    assert [gated_width(hidden) for hidden in (384, 768, 1536, 576, 1152, 2304, 100)] == [
        256, 512, 1024, 384, 768, 1536, 66,
    ]  # fmt: skip


def test_arguments_without_meaning():
    with pytest.raises(ArgumentError, match="activation: unknown 'gelo'; did you mean 'gelu'"):
        ConvGLU(4, 8, activation="gelo")
    with pytest.raises(ArgumentError, match="pre_activation: unknown"):
        ConvGLU(4, 8, pre_activation="none")
    with pytest.raises(ArgumentError, match="hidden_dim: must be at least 1"):
        ConvGLU(4, 0)
