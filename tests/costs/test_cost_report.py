"""What a report says, in every form it says it."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import sympy
import torch
from cost_models import image, on_meta
from markupsafe import escape

from attnrewrite import analyze
from attnrewrite.__main__ import main
from attnrewrite.algebra import symbols
from attnrewrite.costs import Hardware
from attnrewrite.errors import ArgumentError, ConversionError
from attnrewrite.hosts.loading import load_model

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.fixture(scope="module")
def vit():
    return analyze(load_model("timm:vit_tiny_patch16_224", **SMALL).eval())


@pytest.fixture(scope="module")
def vit_small():
    """The paper's, for figures that are known."""
    return load_model("timm:vit_small_patch16_224").eval()


@pytest.fixture(scope="module")
def compared(vit_small):
    return analyze(vit_small, to="transnext", hardware="h200")


def test_sites_add_up_to_the_model(vit):
    assert sum(site.macs for site in vit.sites) == vit.total
    assert {site.kind for site in vit.sites} == {"stem", "SA", "MLP", "linear"}
    assert vit.order == "Θ(n²)"
    by_kind = {site.kind: site.formula.order for site in vit.sites}
    assert by_kind == {"stem": "Θ(n)", "SA": "Θ(n²)", "MLP": "Θ(n)", "linear": "Θ(1)"}


def test_modules_add_up_to_their_parents(vit):
    costs = {module.name: module.cost.macs for module in vit.modules}
    assert costs[""] == vit.total
    assert costs["blocks.0"] == costs["blocks.0.attn"] + costs["blocks.0.mlp"]
    assert vit.uncalled_modules == []


def test_other_sizes_take_microseconds(vit):
    vit.at(512, 384)
    start = time.perf_counter()
    for side in range(64, 164):
        vit.at(side, side)
    assert (time.perf_counter() - start) / 100 < 1e-3
    assert vit.at(224).macs == vit.total
    assert vit.at(224, 224, batch=3).flops == 6 * vit.total
    assert vit.at(448, 224, dtype="float16").saved * 2 == vit.at(448, 224, dtype="float32").saved


def test_conventions_are_views_of_one_count():
    model = on_meta("timm:vit_small_patch16_224")
    totals = {name: analyze(model, image(224), convention=name).total for name in ("mac", "flop", "fvcore")}
    assert totals == {"mac": 4_598_882_304, "flop": 9_197_764_608, "fvcore": 4_608_338_304}


def test_a_conversion_that_raises_the_cost_of_a_small_image_says_from_where_it_pays(compared):
    """Gated MLPs cost more at every size, pooled attention less the larger the image."""
    comparison = compared.comparison
    assert "raises the cost at 224x224 from 4.599 GMAC to 5.785 GMAC" in comparison.verdict
    [crossing] = comparison.crossovers
    assert f"cheaper one on square images from {crossing:.0f} px up" in comparison.verdict
    before, after = (comparison.before.macs, comparison.formula.macs)
    assert after(1, 512, 512) > before(1, 512, 512)
    assert after(1, 544, 544) < before(1, 544, 544)
    assert {row.after.kind for row in comparison.rows} == {"stem", "AA", "ConvGLU", "linear"}


def test_a_model_without_values_is_counted_and_says_why_it_has_no_sites():
    found = analyze(on_meta("timm:vit_tiny_patch16_224", depth=1), image(224))
    assert found.sites == []
    assert any("no sites, the model could not be captured: model: VisionTransformer is on the meta" in note
               for note in found.assumptions)  # fmt: skip
    assert found.at(224, 224).macs == found.total


def test_pooled_aggregated_attention_raises_the_cost_of_vit_s_below_284_pixels():
    """With 7x7 pooled keys at every size; the closed form leaves out the MLP of the position bias."""
    model = load_model("timm:vit_small_patch16_224", class_token=False, global_pool="avg", depth=2)
    published = {"official": True, "pool_size": 7, "fidelity": "fresh"}
    found = analyze(model, torch.randn(1, 3, 224, 224), to="aggregated", **published).comparison
    c, p, k = 384, 49, 9
    closed = (c + 2 * p + 3 * k + (c * c + 20 * c * p + 6 * c * k + 4 * p * p + 12 * p * k + 9 * k * k) ** 0.5) / 4
    assert 16 * closed**0.5 == pytest.approx(284, abs=0.5)

    def dearer(side: float) -> float:
        n, distances = (side / 16) ** 2, (2 - 1 / 7) ** 2 * (side / 16) ** 2
        return n * c * c + 2 * p * c * c + (2 * p + 3 * k) * n * c - 2 * n * n * c + distances * 512 * (2 + 6)

    assert "raises the cost at 224x224" in found.verdict
    [crossing] = found.crossovers
    assert dearer(crossing - 0.1) > 0 > dearer(crossing + 0.1)


def test_crossovers_of_conversions_are_the_closed_forms(vit_small, compared):
    """With t = 1 class token and n = s²/256 cells: a neighborhood pays for n > k²; pooled attention where
    n² - n (t + P) > k² n with P = n/4 cells and two local products; the decomposed form where 2n² > n (4√n + 25)."""
    from attnrewrite.costs.report.what_if import converted_cost

    crossings = {
        (target, *options.values()): converted_cost(compared, target, options).crossovers
        for target, options in (
            ("neighborhood", {"kernel_size": 7}), ("aggregated", {"window_size": 3}), ("manhattan_decomposed", {}),
        )
    }  # fmt: skip
    local = 3 * 9  # query with key, with learned token, and weight with value, in units of half a pair
    assert crossings["neighborhood", 7] == pytest.approx([16 * 7])
    assert crossings["aggregated", 3] == pytest.approx([16 * (local / (2 * (1 - 1 / 4))) ** 0.5])
    assert crossings["manhattan_decomposed",] == pytest.approx([16 * (1 + 13.5**0.5)], abs=3)  # the class token


@pytest.mark.slow
def test_two_models_cross_twice(vit_small):
    swin = load_model("timm:swin_tiny_patch4_window7_224").eval()
    first, second = analyze(vit_small), analyze(swin)
    assert first.crossover(second) == pytest.approx([67, 183], abs=1)
    assert first.compare(second).orders == ("Θ(n²)", "Θ(n)")
    assert [check.equal for check in second.checks] == [True] * len(second.checks)


def test_json_holds_everything_and_expressions_come_back(compared):
    data = json.loads(compared.to_json())
    assert data["schema_version"] == 1
    assert data["total"] == 4_598_882_304
    assert sum(site["macs"] for site in data["sites"]) == data["total"]
    names = {name: getattr(symbols, name) for name in ("down", "up")}
    assert sympy.sympify(data["macs"]["srepr"], locals=names) == compared.expression
    assert set(data["macs"]) == {"srepr", "text", "latex"}
    assert data["comparisons"][0]["crossovers"] == compared.comparison.crossovers
    assert compared.to_records()[0]["name"] == "patch_embed.proj"


def test_text_and_markdown_state_unit_size_checks_and_what_is_missing(compared):
    text = str(compared)
    for part in (
        "at 224x224, batch 1, float32: 4.599 GMAC", "22,050,664 parameters", "blocks.{0...11}.attn", "4·C²·N + 2·C·N²",
        "9·H²·W²/64 + 84168·H·W + 21626880 MACs per image on multiples of 16 px, Θ(n²)",
        "check 224x224: equal (4 598 882 304 MAC)", "not counted: nothing", "assumptions: none",
    ):  # fmt: skip
        assert part in text
    lines = compared.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in table[:6]}) == 1


class Page(HTMLParser):
    """Nesting, and what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(compared, tmp_path):
    text = compared.to_html(tmp_path / "cost.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "script" not in page.seen
    assert page.seen.count("svg") == 2
    assert "url(" not in text
    assert str(escape(compared.comparison.verdict)) in text
    for value in re.findall(r'(?:cx|cy|x1|y1)="([^"]+)"', text):
        assert -1 <= float(value) <= 761
    assert compared._repr_html_() in text


def test_windows_and_neighborhoods_are_bound_by_memory(vit):
    roof = vit.roofline("h200")
    core = next(point for point in roof.points if point.name == "blocks.0.attn attention")
    assert core.intensity == pytest.approx(197 / 2)  # half the tokens, each operand moved once in 16 bits
    assert core.limit == "memory"
    assert "bound" in str(roof)
    slow = Hardware("slow", peak={"bfloat16": 1e9}, bandwidth=1e12)
    assert {point.limit for point in vit.roofline(slow).points} == {"compute"}


def test_training_costs(vit):
    training = vit.training
    tokens, width, depth = 197, 48, 2
    products = tokens**2 * width
    embedding = 196 * 768 * width  # whose image needs no gradient
    assert training.forward == vit.total
    assert training.backward == 2 * vit.total - embedding + depth * products  # fused attention multiplies once more
    assert training.step == training.forward + training.backward
    assert training.peak > training.saved > training.peak_inference
    assert training.states == 4 * 4 * vit.parameters.total


def test_the_memory_that_grows_fastest_is_the_attention_map(vit):
    heads, depth = 3, 2
    assert vit.dominant_memory == sympy.Rational(heads * depth, 16**4) * symbols.H**2 * symbols.W**2


def test_costs_without_an_image_are_numbers():
    report = analyze(torch.nn.Linear(16, 4), torch.zeros(2, 16))
    assert report.total == 2 * 16 * 4
    assert "no image among the inputs" in str(report)


def test_formulas_that_fail_at_other_sizes_are_dropped_and_said_so():
    """Attention over channels has as many queries at every size, which one size does not show."""

    class OverChannels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Conv2d(3, 16, 8, 8)
            self.mix = torch.nn.Linear(16, 8)

        def forward(self, pixels):
            tokens = self.embed(pixels).flatten(2).transpose(1, 2)
            return self.mix((tokens.transpose(1, 2) @ tokens).softmax(-1))

    report = analyze(OverChannels(), torch.zeros(1, 3, 32, 32))  # 16 tokens of 16 channels
    equal = {(check.height, check.width): check.equal for check in report.checks}
    assert equal == {(32, 32): True, (40, 48): True, (41, 43): False}
    assert any("formula and count differ: 41x43" in note for note in report.assumptions)
    [refuted] = [site for site in report.sites if site.formula is None]
    assert (refuted.name, refuted.why) == ("mix", "its formula holds at 32x32 and not at 41x43")
    assert report.at(64, 96).macs == 96 * (3 * 64 * 16 + 16 * 16) + 16 * 16 * 8
    assert any("interpolated" in note for note in report.assumptions)


def test_peak_memory_of_a_chain_is_known():
    class Chain(torch.nn.Module):
        def forward(self, pixels):
            for _ in range(3):
                pixels = torch.relu(pixels)
            return pixels

    size = 3 * 16 * 16 * 4
    report = analyze(Chain(), torch.zeros(1, 3, 16, 16))
    assert report.training.peak_inference == 3 * size  # the image, which the caller holds, an operand and its result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convention": "macs"}, "did you mean 'mac'"), ({"hardware": "h20"}, "did you mean"),
        ({"kernel_size": 3}, "pass to="), ({"to": ["neighborhood", "rmt"], "kernel_size": 3}, "in target objects"),
        ({"to": "neighborhood", "compare": torch.nn.Identity()}, "not both"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        analyze(load_model("timm:vit_tiny_patch16_224", **SMALL, img_size=32).eval(), **arguments)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"height": 0}, "^height: must be a whole number of at least 1, got 0$"),
        ({"width": 0}, "^width: must be a whole number of at least 1, got 0$"),
        ({"height": -224}, "^height: must be a whole number of at least 1, got -224$"),
        ({"width": 112.5}, r"^width: must be a whole number of at least 1, got 112\.5$"),
        ({"height": 15}, "^height: at 15 px a map of VisionTransformer is empty; use 16 px or more$"),
        ({"width": 8}, "^width: at 8 px a map of VisionTransformer is empty; use 16 px or more$"),
        ({"height": 3, "width": 3}, "^height: at 3 px"),
    ],
)
def test_impossible_sizes_have_no_cost(vit, sides, message):
    with pytest.raises(ArgumentError, match=message):
        vit.at(**sides)


def test_sides_that_are_not_given_are_the_examples(vit):
    assert (vit.at().height, vit.at().width) == (224, 224)
    assert (vit.at(96).height, vit.at(96).width) == (96, 96)
    assert (vit.at(width=96).height, vit.at(width=96).width) == (224, 96)
    assert vit.at(16, 16).macs > 0  # one patch


def test_wrong_questions_are_named(vit):
    with pytest.raises(ArgumentError, match="batch: must be a whole number of at least 1, got 0"):
        vit.at(224, 224, batch=0)
    with pytest.raises(ArgumentError, match=r"dtype: unknown, got .int8."):
        vit.at(224, 224, dtype="int8")
    with pytest.raises(ArgumentError, match=r"wrt: crossovers are in .pixels."):
        vit.crossover(vit, wrt="tokens")
    with pytest.raises(ArgumentError, match="hardware: required"):
        vit.roofline()
    with pytest.raises(ArgumentError, match=r"H200 SXM has peaks for .*, got .int4."):
        vit.roofline("h200", dtype="int4")
    with pytest.raises(ArgumentError, match=r"expected a torch\.nn\.Module"):
        analyze("vit")


def test_targets_without_a_site_say_so():
    mlp = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(32, 4))
    with pytest.raises(ConversionError, match="no attention"):
        analyze(mlp, torch.zeros(1, 3, 8, 8), to="neighborhood")


def test_plots_need_matplotlib(vit):
    if "matplotlib" in sys.modules or _has_matplotlib():
        assert len(vit.plot().lines) == 1
        return
    with pytest.raises(ArgumentError, match=r"attnrewrite\[plots\]"):
        vit.plot()


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_command_line(tmp_path, capsys):
    spec = tmp_path / "tiny.py"
    spec.write_text(
        "from attnrewrite.hosts.loading import load_model\n\n\ndef build(img_size=64):\n"
        f"    return load_model('timm:vit_tiny_patch16_224', img_size=img_size, **{SMALL})\n"
    )
    page, data = tmp_path / "cost.html", tmp_path / "cost.json"
    options = ["--size", "96x64", "--to", "manhattan_decomposed", "--html", str(page), "--json", str(data)]
    assert main(["analyze", f"{spec}:build", *options]) == 0
    assert "at 96x64" in capsys.readouterr().out
    assert json.loads(data.read_text())["input"]["height"] == 96
    assert "MaSA-d" in page.read_text(encoding="utf-8")
    assert main(["analyze", f"{spec}:build", "--size", "big"]) == 2
    assert "--size: expected HEIGHTxWIDTH" in capsys.readouterr().err


def test_the_package_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "attnrewrite", "analyze", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--compare" in done.stdout
