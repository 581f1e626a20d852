"""Attention whose code writes in place: scores that are added to, dropout, tensors of the caller."""

from __future__ import annotations

import pytest
import torch
from small_models import assert_same_gradients, difference, gradients
from torch import Tensor, nn

import attnrewrite
from attnrewrite.capture import IN_PLACE, capture


class InPlace(nn.Module):
    """Scaled, biased and dropped in place; ``writes_back`` adds the result to the tokens that it was given."""

    def __init__(self, writes_back: bool = False, rate: float = 0.0) -> None:
        super().__init__()
        self.packed, self.out, self.writes_back = nn.Linear(24, 72), nn.Linear(24, 24), writes_back
        self.bias, self.drop = nn.Parameter(torch.randn(3, 16, 16)), nn.Dropout(rate, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT
        scores *= 8**-0.5
        scores += self.bias
        mixed = self.out((self.drop(scores.softmax(-1)) @ value).transpose(1, 2).flatten(2))
        if self.writes_back:
            x += mixed
            return x
        return mixed


class Sliced(nn.Module):
    """Writes into a part of a value that it reads as a whole afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = InPlace()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(x)
        mixed[:, :4].add_(1.0)
        return mixed


class Turned(Sliced):
    """Writes into a view that no operator's schema names as one."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(x)
        torch.einsum("bnc->bcn", mixed).add_(1.0)
        return mixed


class Counting(Sliced):
    """Writes into its own buffer, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[:1].add_(1.0)
        return self.attention(x) * self.calls[:1]


class Model(nn.Module):
    """Patches, a block, and what the patches are after it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 24, 16, 16), block, nn.Linear(24, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2).contiguous()
        y = self.block(x)
        return self.head((x + 2 * y).mean(1))


BLOCKS = {"in place": InPlace, "writes back": lambda: InPlace(writes_back=True), "a part": Sliced, "a view": Turned}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("to", "options"), [("identity", {}), ("neighborhood", {"kernel_size": 4})])
def test_attention_that_writes_in_place_is_rewritten(name, to, options):
    torch.manual_seed(0)
    donor = Model(BLOCKS[name]()).eval().double()
    if to == "neighborhood":  # the bias of a kernel is a table of offsets
        for module in donor.modules():
            if isinstance(module, InPlace):
                nn.init.zeros_(module.bias)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    converted = attnrewrite.convert(donor, to, image, fidelity="exact", progress=False, **options)
    assert [row.kind for row in attnrewrite.report(converted).converted].count("attention") == 1
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(converted(images), donor(images)) < 1e-12
    if name != "writes back":  # over what its own backward pass needs
        assert_same_gradients(gradients(converted, images), gradients(donor, images))


def test_dropout_in_place_goes_on_in_training():
    donor = Model(InPlace(rate=0.4)).eval()
    converted = attnrewrite.convert(donor, "identity", torch.randn(1, 3, 64, 64), progress=False).train()
    assert {module.dropout for module in converted.modules() if hasattr(module, "dropout")} == {0.4}
    image = torch.randn(2, 3, 64, 64)
    assert difference(converted(image), converted(image)) > 1e-3


@pytest.mark.parametrize("block", [Sliced, Turned, Counting])
def test_only_what_nothing_reads_afterwards_is_stated_anew(block):
    nodes = list(capture(Model(block()), torch.randn(1, 3, 64, 64)).graph.nodes)
    assert "aten.add_.Tensor" in [str(node.target) for node in nodes]  # into a part of what is read as a whole
    restated = [str(node.target) for node in nodes if IN_PLACE in node.meta]
    assert restated == ["aten.mul.Tensor", "aten.add.Tensor", "aten.dropout.default"]
