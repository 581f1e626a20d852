"""``to="conv_glu"``: what the new parameters do, which units the matched width keeps, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from attnrewrite.patterns.targets.conv_glu import ConvGlu
from conversions import converted, copied
from damaged_targets import assert_not_installed
from repetition import thinned
from site_donors import new_cores, plan_of, rows_of
from target_donors import distance, donor, images, logits, moved
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

import attnrewrite
from attnrewrite.errors import ArgumentError
from attnrewrite.modules.conv_glu import ConvGLU

KEEP = ("vit", "conv_glu", {})
MATCH = {"hidden": "match"}


def official_unit(mlp, core, sides):
    """The published module with a donor's maps, and the value, convolution and activation that were added to it."""
    unit = ConvGLU(mlp.fc1.in_features, mlp.fc1.out_features).double()
    with torch.no_grad():
        unit.fc1.weight.copy_(torch.cat([mlp.fc1.weight, core.value.weight]))
        unit.fc1.bias.copy_(torch.cat([mlp.fc1.bias, core.value.bias]))
        unit.dwconv.dwconv.load_state_dict(core.conv.conv.state_dict())
        unit.fc2.load_state_dict(mlp.fc2.state_dict())

    def forward(tokens):
        prefix = tokens.shape[1] - sides[0] * sides[1]
        pixels = [unit(token[:, None, None]) for token in tokens[:, :prefix].unbind(1)]
        image = unit(tokens[:, prefix:].unflatten(1, sides))
        return torch.cat([*(pixel[:, 0] for pixel in pixels), image.flatten(1, 2)], dim=1)

    return forward


@pytest.mark.parametrize(("name", "sides"), [("vit", (4, 6)), ("vit, registers", (4, 5)), ("vit, average", (6, 5))])
def test_trained_parameters_act_as_in_the_published_unit(name, sides):
    """Also on prefix tokens, which are maps of one pixel."""
    model, expected = moved(copied((name, "conv_glu", {})), donor(name)), copy.deepcopy(donor(name))
    for block, core in zip(expected.blocks, new_cores(model, "mlp"), strict=True):
        block.mlp.forward = official_unit(block.mlp, core, sides)
    batch = images(name)
    assert distance(logits(model, batch), logits(expected, batch)) < 1e-12
    assert distance(logits(model, batch), logits(donor(name), batch)) > 1e-2


def test_a_gate_keeps_its_value_and_a_convolution_its_place():
    """A gated MLP is given no value, and PVT v2's no convolution."""
    for name, parts in (("vit, swiglu", {"conv"}), ("vit, packed gate", {"conv"}), ("pvt v2, linear", {"value"})):
        for core in new_cores(converted((name, "conv_glu", {})), "mlp"):
            assert {part for part, _ in core.named_children()} - {"act"} == parts
    row = rows_of(converted(("vit, swiglu and norm", "conv_glu", {})), "mlp")[0]
    assert "inner norm kept" in row.why


@pytest.mark.parametrize("name", ["vit, average", "swin, torchvision", "pvt v2", "vit, swiglu"])
def test_gradients_reach_every_new_weight(name):
    model = copied((name, "conv_glu", {}))
    model(images(name)).square().sum().backward()
    for core in new_cores(model, "mlp"):
        for weight in core.parameters():
            assert float(weight.grad.abs().max()) > 0
        if core.conv is not None:
            assert bool((core.conv.conv.weight.grad.abs().amax(dim=(0, 1)) > 0).all())  # every tap


def refitted(name):
    """The donor with a third of every MLP's units cut off and its second map solved anew, and the shares kept."""
    model, shares = copy.deepcopy(donor(name)), []
    mlps = [m for m in model.modules() if isinstance(m, Mlp | MlpWithDepthwiseConv) or type(m).__name__ == "MLP"]
    seconds = [[m for m in mlp.modules() if isinstance(m, nn.Linear)][-1] for mlp in mlps]
    seen = {}
    hooks = [s.register_forward_pre_hook(lambda m, given: seen.update({m: given[0].flatten(0, -2)})) for s in seconds]
    with torch.no_grad():
        model(images(name))
        for second, hook in zip(seconds, hooks, strict=True):
            hook.remove()
            hidden, weight = seen[second], second.weight
            outer = [hidden[:, unit, None] * weight[:, unit] for unit in range(len(weight.T))]
            given = torch.stack([part.square().sum() for part in outer])
            kept = given.argsort(descending=True)[: int(2 * len(given) / 3)]
            shares.append(float(given[kept].sum() / given.sum()))
            mask = torch.zeros_like(given).index_fill(0, kept, 1.0)
            lost = hidden @ (weight * (1 - mask)).T
            x = torch.cat([hidden[:, kept], torch.ones(len(hidden), 1, dtype=torch.float64)], dim=1)
            damping = (1e-3 * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
            rows, wanted = torch.cat([x, damping]), torch.cat([lost, damping.new_zeros(len(damping), lost.shape[1])])
            change = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
            second.weight.mul_(mask).index_add_(1, kept, change[:-1].T)
            second.bias += change[-1]
    return model, shares


MATCHED = ["vit", "swin, torchvision", "pvt v2", "pvt v2, linear"]


@pytest.mark.parametrize("name", MATCHED)
def test_the_matched_width_is_the_refit_of_an_independent_solve(name):
    """With fewer example tokens than units (the last stages of the pyramids) and with more."""
    model, (expected, shares) = converted((name, "conv_glu", MATCH)), refitted(name)
    batch = images(name, 3, seed=6)
    assert distance(logits(model, batch), logits(expected, batch)) < 1e-9
    assert distance(logits(model, batch), logits(donor(name), batch)) > 1e-4
    rows = rows_of(model, "mlp")
    assert [row.settings["kept_share"] for row in rows] == pytest.approx(shares, abs=1e-6)
    assert {row.exactness for row in rows} == {"PROJECTED"}
    assert all(row.error > 1e-4 for row in rows)  # on the example input


class Unfitted(ConvGlu):
    """The units with the largest columns, and the second map as it was."""

    def fit(self, conversion, site, weights, values):
        return conversion


class Biased(ConvGlu):
    """A refit without a constant, on values that are not centered."""

    def fit(self, conversion, site, weights, values):
        fitted = super().fit(conversion, site, weights, values)
        with torch.no_grad():
            fitted.core.fc2.bias.copy_(conversion.core.fc2.bias)
        return fitted


@pytest.mark.parametrize("name", thinned(MATCHED, 2))
def test_the_refit_wins_on_held_out_images(name):
    batch = images(name, 8, seed=11)
    wanted = logits(donor(name), batch)
    errors = [
        distance(logits(attnrewrite.convert(donor(name), target, images(name)), batch), wanted)
        for target in (ConvGlu("match"), Biased("match"), Unfitted("match"))
    ]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_the_local_error_is_that_of_the_mlp():
    model, given = converted(("vit", "conv_glu", MATCH)), []
    donor_mlp = donor("vit").blocks[0].mlp
    hook = donor_mlp.register_forward_hook(lambda m, x, y: given.extend((x[0], y)))
    logits(donor("vit"), images("vit"))
    hook.remove()
    with torch.no_grad():
        actual = model.blocks[0].mlp(given[0])
    error = float((actual - given[1]).abs().max() / given[1].abs().max())
    assert rows_of(model, "mlp")[0].error == pytest.approx(error, rel=1e-9)


def test_the_matched_width_has_as_many_weights_as_the_mlp():
    old = sum(p.numel() for p in donor("vit").blocks[0].mlp.parameters())
    new = sum(p.numel() for p in new_cores(converted(("vit", "conv_glu", MATCH)), "mlp")[0].parameters())
    assert 1.0 < new / old < 1.2  # the taps and the smaller biases come on top
    assert rows_of(converted(("vit, swiglu", "conv_glu", MATCH)), "mlp")[0].exactness == "EXACT"  # it has that width


def test_dropout_stays_where_it_was():
    name, batch = "vit, dropout", images("vit, dropout")
    models = [copied((name, "conv_glu", {})).train(), copy.deepcopy(donor(name)).train()]
    outputs = []
    for model in models:
        torch.manual_seed(3)
        outputs.append(logits(model, batch))
    assert torch.equal(*outputs)
    matched = copied((name, "conv_glu", MATCH))
    assert [core.drop.p for core in new_cores(matched, "mlp")] == [0.2, 0.2]
    assert distance(logits(matched.train(), batch), logits(matched.eval(), batch)) > 1e-2


class BehindStem(nn.Module):
    """A unit on the map of a convolution; ``twice`` also on what it gave, added to the map."""

    def __init__(self, unit, twice=False):
        super().__init__()
        self.stem, self.unit, self.twice = nn.Conv2d(3, 8, 4, 4), unit, twice

    def forward(self, image):
        tokens = self.stem(image).permute(0, 2, 3, 1)
        return self.unit(tokens + self.unit(tokens)) if self.twice else self.unit(tokens)


def test_an_mlp_that_is_called_twice_stays_one():
    model = BehindStem(Mlp(8, 12), twice=True).double().eval()
    batch = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for options, largest in (({}, 1e-12), (MATCH, 1.0)):
        rewritten = attnrewrite.convert(model, "conv_glu", batch, **options)
        assert len(new_cores(rewritten, "mlp")) == 1
        assert distance(logits(rewritten, batch), logits(model, batch)) < largest
        rewritten(batch).sum().backward()
        assert all(parameter.grad is not None for parameter in rewritten.parameters())


FAULTS = {
    "the kernel's center moved": lambda core: core.conv.conv.weight.data.copy_(core.conv.conv.weight.roll(1, -1)),
    "a bias on the convolution": lambda core: core.conv.conv.bias.data.add_(0.1),
    "no bias on the value": lambda core: core.value.bias.data.zero_(),
    "another activation": lambda core: setattr(core, "activation", "silu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_core_is_not_installed(fault):
    assert_not_installed(ConvGlu(), lambda conversion: FAULTS[fault](conversion.cores[0]))


class Between(nn.Module):
    """An MLP with something else between its maps, after a convolution that makes tokens."""

    def __init__(self, between, shuffled=False):
        super().__init__()
        self.stem, self.fc1, self.between, self.fc2 = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), between, nn.Linear(12, 8)
        self.shuffled = shuffled

    def forward(self, image):
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        if self.shuffled:
            tokens = tokens.flip(1)
        return self.fc2(self.between(self.fc1(tokens)))


class OnMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, tokens):
        image = tokens.transpose(1, 2).unflatten(2, (4, 4))
        return self.conv(image).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Between(nn.Sequential(nn.LayerNorm(12), nn.GELU())), "a norm between its linear maps"),
        (Between(nn.Sequential(OnMap(), OnMap(), nn.GELU())), "it is no activation between two linear maps"),
        (Between(nn.Sequential(nn.GELU(), OnMap())), "its convolution follows its activation"),
        (Between(nn.GELU(), shuffled=True), "the positions of its tokens on the map are unknown"),
    ],
    ids=["norm", "two convolutions", "convolution behind", "no map"],
)
def test_what_has_no_place_in_a_gated_unit_is_refused(model, reason):
    plan = attnrewrite.plan(model.eval(), "conv_glu", torch.randn(1, 3, 16, 16))
    (mlp,) = [planned for planned in plan.sites if planned.site.kind == "mlp"]
    assert mlp.status == "refused"
    assert reason in mlp.why
    assert f'leave it out with keep="{mlp.site.name}"' in str(plan)


def test_an_inner_norm_is_refused_with_its_reason():
    plan = plan_of("vit, inner norm", "conv_glu")
    reasons = {planned.why for planned in plan.sites if planned.site.kind == "mlp"}
    assert len(reasons) == 1
    assert "norm" in reasons.pop()


def test_a_gated_unit_with_a_convolution_is_left_as_it_is():
    plan = attnrewrite.plan(BehindStem(ConvGLU(8, 12)).eval(), "conv_glu", torch.randn(1, 3, 16, 16))
    (mlp,) = [planned for planned in plan.sites if planned.site.kind == "mlp"]
    assert (mlp.status, mlp.why) == ("untouched", "it is a convolutional gated linear unit already")


def test_unknown_widths_are_refused():
    with pytest.raises(ArgumentError, match="hidden: expected 'keep' or 'match', got 'half'"):
        attnrewrite.convert(donor("vit"), "conv_glu", images("vit"), hidden="half")
