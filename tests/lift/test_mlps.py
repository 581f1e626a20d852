"""What is an MLP, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnrewrite.planning import lifted


def kinds(*between: nn.Module) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 8)).eval()
    made, _ = lifted(model, torch.randn(2, 5, 8))
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
