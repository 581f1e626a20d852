"""What is an MLP, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import ConversionError
from attnrewrite.modules.conv_ffn import ConvFFN
from attnrewrite.planning.stages import lifted


def kinds(*between: nn.Module) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 8)).eval()
    made = lifted(model, torch.randn(2, 5, 8))
    return [str(planned.site.describe()) for planned in made.sites]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ([nn.GELU()], ["mlp 8->16 gelu"]),
        ([nn.GELU(), nn.LayerNorm(16)], ["mlp 8->16 gelu, norm"]),
        ([nn.LayerNorm(16)], []),  # Swin's merge and the next block's projection
        ([], []),
    ],
)
def test_an_mlp_has_an_activation(between, expected):
    assert kinds(*between) == expected


class Residual(ConvFFN):
    """RMT's feed-forward network on a map, where ``moved`` mixes up what is added."""

    def __init__(self, moved: str = "") -> None:
        super().__init__(8, 16)
        self.moved = moved

    def forward(self, source: Tensor) -> Tensor:
        if not self.moved:
            return super().forward(source)
        hidden = nn.functional.gelu(self.fc1(source))
        added = self.dwconv(hidden)
        added = added.transpose(1, 2) if self.moved == "transposed" else added.roll(1, 1)
        return self.fc2(hidden + added)


def residual(moved: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Residual(moved).eval().double()


MAP = torch.randn(2, 5, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_convolution_that_is_added_to_its_operand_is_part_of_the_mlp():
    explained = " ".join(str(attnrewrite.explain(residual(), MAP)).split())
    assert "mlp 8->16 gelu, depthwise residual" in explained
    assert "certified" in explained
    assert "refused: its convolution follows its activation" in explained


@pytest.mark.parametrize("moved", ["transposed", "rolled"])
def test_a_convolution_that_comes_back_elsewhere_is_not(moved):
    assert lifted(residual(moved), MAP).sites == ()


def test_rebuilding_it_keeps_the_function_and_conv_glu_refuses_it():
    donor = residual()
    model = attnrewrite.convert(donor, "identity", MAP, progress=False)
    assert torch.allclose(model(MAP), donor(MAP), rtol=1e-12, atol=1e-12)
    with pytest.raises(ConversionError, match="its convolution follows its activation"):
        attnrewrite.convert(donor, "conv_glu", MAP, progress=False)


def test_its_weights_are_those_of_both_maps_and_the_convolution():
    made = lifted(residual(), MAP)
    flow = made.flow
    [planned] = made.sites
    assert sum(flow.weights(node).numel() for node in planned.site.weights()) == 2 * 8 * 16 + 16 + 8 + 16 * 9 + 16
