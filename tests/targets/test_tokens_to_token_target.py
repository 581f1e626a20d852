"""``to="tokens_to_token"``: four ways to a tokens-to-token stem, the error of the narrow one, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from attnrewrite.patterns.targets.tokens_to_token import TokensToToken, nearest_stem
from conversions import copied
from damaged_targets import assert_not_installed
from site_donors import new_cores, plan_of, rows_of
from target_donors import distance, donor, images, logits, moved, new_parameters
from torch import nn

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError
from attnrewrite.modules.tokens_to_token import TokensToToken as PublishedStem

KINDS = pytest.mark.parametrize("kind", ["transformer", "performer"])


def case(**options):
    return ("vit", "tokens_to_token", options)


def natural_covariance(colours=3, side=16, along=0.95, between=0.9):
    """Of pixels whose correlation falls exponentially along both axes, ``[n, n]`` by colour, row, column."""
    place = torch.arange(side, dtype=torch.float64)
    axis = along ** (place[:, None] - place).abs()
    colour = torch.full((colours, colours), between, dtype=torch.float64).fill_diagonal_(1.0)
    return torch.kron(colour, torch.kron(axis, axis))


def random_filters(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, 3, 16, 16, generator=generator, dtype=torch.float64)


@KINDS
def test_the_branch_is_the_published_stem_beside_the_convolution(kind):
    model = moved(copied(case(kind=kind)), donor("vit"), size=0.1)
    (core,) = new_cores(model, "stem")
    published = PublishedStem(3, 24, kind).double().eval()
    published.load_state_dict(core.state_dict())
    expected, batch = copy.deepcopy(donor("vit")), images("vit")
    convolution = expected.patch_embed.proj
    own = convolution.forward
    convolution.forward = lambda image: own(image) + published(image).permute(0, 3, 1, 2)
    assert distance(logits(model, batch), logits(expected, batch)) < 1e-12
    assert distance(logits(model, batch), logits(donor("vit"), batch)) > 1e-3


@KINDS
@pytest.mark.parametrize(
    ("mode", "at_once"),
    [
        ("branch", ["project.weight", "project.bias"]),
        ("exact", ["project.weight", "project.bias", "attention1.attn.proj.weight", "attention2.mlp.fc2.weight"]),
        ("fit", ["project.weight", "attention1.attn.qkv.weight", "attention2.attn.qkv.weight"]),
    ],
)
def test_gradients_reach_what_starts_at_zero_and_then_everything(mode, at_once, kind):
    """What lies before a map of zeros learns from the second step on."""
    model = copied(case(mode=mode, kind=kind))
    new = {name.partition("_stem.")[2]: p for name, p in new_parameters(model, donor("vit")).items() if p.requires_grad}
    model(images("vit")).square().sum().backward()
    for name in at_once if kind == "transformer" else at_once[:1]:
        assert float(new[name].grad.abs().max()) > 0, name
    with torch.no_grad():
        for parameter in new.values():
            parameter.sub_(0.01 * parameter.grad / parameter.grad.norm().clamp(min=1e-12))
            parameter.grad = None
    for _ in range(2):
        model(images("vit")).square().sum().backward()
        with torch.no_grad():
            for parameter in new.values():
                parameter.sub_(0.01 * parameter.grad / parameter.grad.norm().clamp(min=1e-12))
    assert [name for name, parameter in new.items() if not float(parameter.grad.abs().max()) > 0] == []


@KINDS
@pytest.mark.parametrize("covariance", [None, natural_covariance()], ids=["white", "natural"])
def test_the_error_of_the_narrow_stem_is_the_reported_one(kind, covariance):
    """Measured on the matrix that the stem is: its answers to single pixels."""
    model = attnrewrite.convert(donor("vit"), TokensToToken("fit", kind, covariance=covariance), images("vit", 1))
    (core,) = new_cores(model, "stem")
    spread = torch.eye(768, dtype=torch.float64) if covariance is None else covariance
    with torch.no_grad():
        pixels = torch.eye(768, dtype=torch.float64).view(768, 3, 16, 16)
        matrix = (core(pixels) - core(torch.zeros_like(pixels[:1]))).flatten(1).T
        weight, bias = donor("vit").patch_embed.proj.weight.flatten(1), donor("vit").patch_embed.proj.bias
        error = matrix - weight
        squared = torch.trace(error @ spread @ error.T) / torch.trace(weight @ spread @ weight.T)
        assert distance(core(torch.zeros_like(pixels[:1])).flatten(), bias) < 1e-12
    (row,) = rows_of(model, "stem")
    assert row.settings["residual"] == pytest.approx(float(squared.sqrt()), rel=1e-9)
    assert row.settings["residual"] > (0.1 if covariance is None else 0.005)


def test_the_error_is_that_of_patches_with_the_given_covariance():
    """Drawn patches: the order of colours, rows and columns matters to this, a symmetric formula would not see it."""
    covariance = natural_covariance()
    covariance[:256] *= 2.0  # the first colour is stronger,
    covariance[:, :256] *= 2.0
    lower = torch.arange(768) % 256 >= 128  # and the lower half darker
    covariance[lower] *= 0.3
    covariance[:, lower] *= 0.3
    weight = random_filters(64)
    narrow, last, residual = nearest_stem(weight, 32, covariance)
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(4000, 768, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    quarters = patches.view(-1, 3, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 192)
    fitted = torch.einsum("dqk,kp,nqp->nd", last, narrow, quarters)
    wanted = patches @ weight.flatten(1).T
    assert float((fitted - wanted).norm() / wanted.norm()) == pytest.approx(residual, rel=0.03)
    assert nearest_stem(weight, 32, None)[2] > 1.5 * residual


@pytest.mark.parametrize(
    ("token_dim", "covariance", "error"),
    [
        (64, None, 0.683), (96, None, 0.539), (160, None, 0.248), (192, None, 0.0),
        (64, natural_covariance(), 0.038), (128, natural_covariance(), 0.008),
    ],
)  # fmt: skip
def test_independent_filters_are_fitted_as_well_as_can_be(token_dim, covariance, error):
    """Known errors of 192 filters of independent weights."""
    assert nearest_stem(random_filters(192), token_dim, covariance)[2] == pytest.approx(error, abs=0.004)


def test_no_stem_nearby_is_nearer():
    weight, covariance = random_filters(48), natural_covariance()
    narrow, last, residual = nearest_stem(weight, 24, covariance)
    generator = torch.Generator().manual_seed(1)

    def error(rows, result):
        order = torch.arange(768).view(3, 2, 8, 2, 8).permute(1, 3, 0, 2, 4).reshape(4, 192)
        matrix = torch.zeros(48, 768, dtype=torch.float64)
        for quarter in range(4):
            matrix[:, order[quarter]] = result[:, quarter] @ rows
        off = matrix - weight.flatten(1)
        return float((torch.trace(off @ covariance @ off.T) / _energy(weight, covariance)).sqrt())

    assert error(narrow, last) == pytest.approx(residual, rel=1e-9)
    for _ in range(8):
        step = 1e-3 * last.std() * torch.randn(last.shape, generator=generator, dtype=torch.float64)
        assert error(narrow, last + step) > residual


def _energy(weight, covariance):
    flat = weight.flatten(1)
    return torch.trace(flat @ covariance @ flat.T)


def test_untrained_stems_are_made_on_request_only():
    with pytest.raises(ConversionError, match="FRESH is below fidelity='projected'"):
        attnrewrite.convert(donor("vit"), "tokens_to_token", images("vit"), mode="fresh")
    model = attnrewrite.convert(donor("vit"), "tokens_to_token", images("vit"), mode="fresh", fidelity="fresh")
    (core,) = new_cores(model, "stem")
    published = PublishedStem(3, 24, "transformer")
    assert {n: p.shape for n, p in core.named_parameters()} == {n: p.shape for n, p in published.named_parameters()}
    assert rows_of(model, "stem")[0].exactness == "FRESH"


FAULTS = {
    "a flipped kernel": lambda core: core.project.weight.data.copy_(
        core.project.weight.unflatten(1, (-1, 3, 3)).flip(-1).flatten(1)
    ),
    "a block off its place": lambda core: core.attention1.attn.qkv.weight.data.copy_(
        core.attention1.attn.qkv.weight.unflatten(1, (3, 7, 7)).roll(1, -1).flatten(1)
    ),
    "a dropped bias": lambda core: core.project.bias.data.zero_(),
    "attention that is not silent": lambda core: core.attention2.attn.proj.weight.data.fill_(0.05),
    "a norm of patches": lambda core: setattr(core.attention1, "norm1", nn.LayerNorm(147).double()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_core_is_not_installed(fault):
    assert_not_installed(TokensToToken("exact"), lambda conversion: FAULTS[fault](conversion.core))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("swin", {}, "this one has stride 4: the number of tokens would change; use to='cross_scale'"),
        ("vit, patches of 14", {}, "this one has stride 14: the number of tokens would change"),
        ("vit, patches of 32", {}, "this one has stride 32: the number of tokens would change"),
        ("vit", {"mode": "fit", "token_dim": 40}, "40 channels cannot carry the 48 values between neighboring tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_reason_and_remedy(name, options, reason):
    plan = plan_of(name, "tokens_to_token", **options)
    stems = [planned for planned in plan.sites if planned.site.kind == "stem"]
    assert {planned.status for planned in stems} == {"refused"}
    assert reason in stems[0].why


def test_patches_that_overlap_are_refused():
    plan = attnrewrite.plan(nn.Conv2d(3, 8, 18, 16, 1).eval(), "tokens_to_token", torch.randn(1, 3, 64, 64))
    assert "not plain 16x16 ones (kernel (18, 18), padding (1, 1))" in plan.sites[0].why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fuse"}, "mode: expected 'branch' or 'exact' or 'fit' or 'fresh', got 'fuse'"),
        ({"kind": "convolution"}, "kind: expected 'transformer' or 'performer', got 'convolution'"),
        ({"token_dim": 0}, "token_dim: expected a positive number, got 0"),
        ({"mode": "exact", "token_dim": 64}, "token_dim: mode='exact' determines it"),
        ({"covariance": torch.eye(768)}, "covariance: requires mode='fit', got mode='branch'"),
        ({"mode": "fit", "covariance": torch.eye(768)[:5]}, "covariance: expected a square matrix"),
        ({"mode": "fit", "covariance": torch.eye(768) * torch.nan}, "covariance: contains NaN"),
        ({"mode": "fit", "covariance": torch.eye(5)}, r"covariance: expected that of the 768 values of a patch"),
    ],
)
def test_options_that_make_no_sense_are_no_argument(options, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(donor("vit"), "tokens_to_token", images("vit"), **options)
