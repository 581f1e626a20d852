"""Every formula against torch's counter on the site spelled out, at random sizes, to the integer."""

import random

import pytest
import spelled_out as spelled
import torch
from sympy import Integer
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.algebra import formulas
from attnrewrite.algebra.site_formula import Widths
from attnrewrite.algebra.symbols import B, H, W, evaluator
from attnrewrite.modules import AggregatedAttention, LongShortDistanceAttention, ManhattanAttention
from attnrewrite.modules.token_layers import TokenPerformer, TokenTransformer

WIDTH, HEADS, BATCH = 64, 4, 2
WIDTHS = Widths(WIDTH, HEADS, WIDTH)


def sizes(smallest: int, seed: int, count: int = 20) -> list[tuple[int, int]]:
    """Not square, not divisible by anything in particular."""
    chosen = random.Random(seed)
    return [(chosen.randint(smallest, 40), chosen.randint(smallest, 40)) for _ in range(count)]


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def source(height: int, width: int) -> torch.Tensor:
    return torch.empty(BATCH, height, width, WIDTH, device="meta")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("formula", "run", "smallest"),
    [
        (lambda h, w: formulas.self_attention(h * w, WIDTHS), spelled.full, 1),
        (lambda h, w: formulas.self_attention(h * w + 5, WIDTHS), lambda s, n, f: spelled.full(s, n, f, prefix=5), 1),
        (lambda h, w: formulas.window_attention(h, w, (7, 7), WIDTHS), lambda s, n, f: spelled.windows(s, n, f, 7), 1),
        (
            lambda h, w: formulas.reduced_attention(h * w, formulas.cells(h, w, 4), 4, True, WIDTHS),
            lambda s, n, f: spelled.reduced(s, n, f, 4), 4,
        ),
        (
            lambda h, w: formulas.reduced_attention(h * w, 49, 1, True, WIDTHS),
            lambda s, n, f: spelled.linearly_reduced(s, n, f, 7), 7,
        ),
        (
            lambda h, w: ManhattanAttention(WIDTH, HEADS).formula(h, w),
            lambda s, n, f: spelled.manhattan(s, n, f, decomposed=False), 1,
        ),
        (
            lambda h, w: ManhattanAttention(WIDTH, HEADS, decomposed=True).formula(h, w),
            lambda s, n, f: spelled.manhattan(s, n, f, decomposed=True), 1,
        ),
        (
            lambda h, w: LongShortDistanceAttention(WIDTH, HEADS, 7).formula(h, w),
            lambda s, n, f: spelled.grouped(s, n, f, 7, 1), 3,
        ),
        (
            lambda h, w: LongShortDistanceAttention(WIDTH, HEADS, 5, 3).formula(h, w),
            lambda s, n, f: spelled.grouped(s, n, f, 5, 3), 3,
        ),
        (
            lambda h, w: TokenTransformer(WIDTH, 16).formula(h * w),
            lambda s, n, f: spelled.token_layer(s.flatten(1, 2), 16, False, f), 1,
        ),
        (
            lambda h, w: TokenPerformer(WIDTH, 16).formula(h * w),
            lambda s, n, f: spelled.token_layer(s.flatten(1, 2), 16, True, f), 1,
        ),
    ],
    ids=["SA", "SA+prefix", "WSA", "SRA", "linear SRA", "MaSA", "MaSA-d", "SDA", "LDA", "T2T", "T2T-p"],
)  # fmt: skip
def test_attention(formula, run, smallest, fused):
    general = formula(H, W)
    macs = evaluator(B * general.in_pixels(general.dense + general.core) + general.in_pixels(general.once))
    for height, width in sizes(smallest, seed=1):
        expected = counted(lambda h=height, w=width: run(source(h, w), HEADS, fused))
        assert macs(BATCH, height, width) == expected, (height, width)
        assert formula(Integer(height), Integer(width)).macs_of(BATCH, 1, 1) == expected


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kernel", [3, 7])
def test_neighborhood_attention_at_any_dilation(kernel, prefix):
    for height, width in sizes(2 * kernel, seed=2):
        expected = counted(lambda h=height, w=width: spelled.neighborhood(source(h, w), HEADS, kernel, prefix))
        for dilation in (1, 2):
            formula = formulas.neighborhood_attention(H, W, prefix, (kernel,) * 2, (dilation,) * 2, WIDTHS)
            assert formula.macs_of(BATCH, height, width) == expected


@pytest.mark.parametrize("learnable", [True, False])
def test_aggregated_attention(learnable):
    module = AggregatedAttention(WIDTH, HEADS, pool_size=7, learnable_tokens=learnable, position_bias=False)
    formula = module.formula(H, W)
    for height, width in sizes(7, seed=3):
        expected = counted(lambda h=height, w=width: spelled.aggregated(source(h, w), HEADS, 3, 7, learnable))
        assert formula.macs_of(BATCH, height, width) == expected


@pytest.mark.parametrize("depthwise", [0, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_mlps(gated, depthwise):
    formula = formulas.mlp(H * W, WIDTH, 100, gated=gated, depthwise=depthwise)
    for height, width in sizes(3, seed=4):
        expected = counted(lambda h=height, w=width: spelled.mlp(source(h, w), 100, gated, depthwise))
        assert formula.macs_of(BATCH, height, width) == expected


def test_cross_scale_embedding_shares_out_its_channels():
    kernels, stride = (4, 8, 16, 32), 4
    filters = [torch.empty(share, 3, k, k, device="meta") for share, k in zip((32, 16, 8, 8), kernels, strict=True)]

    def sides(kernel):
        from attnrewrite.algebra.symbols import strided

        return tuple(strided(side, kernel, stride, (kernel - stride) // 2) for side in (H, W))

    formula = formulas.cross_scale_embedding(sides, 3, 64, kernels)
    for height, width in ((64, 64), (80, 48), (53, 71)):
        pixels = torch.empty(BATCH, 3, height, width, device="meta")

        def run(pixels=pixels):
            for weight in filters:
                torch.conv2d(pixels, weight, stride=stride, padding=(weight.shape[-1] - stride) // 2)

        assert formula.macs_of(BATCH, height, width) == counted(run)


def test_closed_forms_of_the_saved_memory():
    """The eager block keeps its input, query, key, value, probabilities and mixed values: 5CN + hN²."""
    saved = formulas.self_attention(H * W, WIDTHS)
    assert saved.number(saved.saved, 5, 6) == 5 * WIDTH * 30 + HEADS * 30**2
