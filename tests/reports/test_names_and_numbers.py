"""How reports write names and numbers."""

import pytest

from attnrewrite.reports.charts import LogLogChart
from attnrewrite.reports.names import folded_name, folded_names, numberless
from attnrewrite.reports.numbers import error_text, scaled, short
from attnrewrite.reports.tables import aligned


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([""], "(root)"),
        (["blocks.3.attn"], "blocks.3.attn"),
        ([f"blocks.{i}.attn" for i in range(12)], "blocks.{0...11}.attn"),
        (["blocks.0.mlp", "blocks.1.mlp", "blocks.3.mlp"], "blocks.{0...1,3}.mlp"),
        (["layers.0.blocks.1", "layers.2.blocks.1"], "layers.{0,2}.blocks.1"),
    ],
)
def test_names_that_differ_in_numbers_are_one(names, folded):
    assert folded_name(names) == folded
    assert len({numberless(name) for name in names}) == 1


@pytest.mark.parametrize(
    ("value", "long", "narrow"),
    [
        (0, "0 MAC", "0"),
        (96, "96 MAC", "96"),
        (147_648, "147.6 kMAC", "148k"),
        (999_999, "1.000 MMAC", "1M"),
        (4_598_882_304, "4.599 GMAC", "4.6G"),
        (-1500, "-1.500 kMAC", "-1.5k"),
    ],
)
def test_numbers_have_one_prefix(value, long, narrow):
    assert scaled(value, "MAC") == long
    assert scaled(value) == long.removesuffix("MAC").rstrip()
    assert short(value) == narrow


def test_an_error_that_was_not_measured_is_never_zero():
    assert error_text(None) == "not measured"
    assert error_text(0.0) == "0.0e+00"


def test_columns_of_numbers_are_flush_right():
    assert aligned(("site", "MAC"), [("a", "9.000 M"), ("long", "96")]) == [
        "site      MAC",
        "a     9.000 M",
        "long       96",
    ]


def test_a_chart_places_its_ranges_on_its_frame():
    chart = LogLogChart("title", "x", "y", (10, 1000), (1, 100), x_values=(10, 100, 5000), marked=5000)
    frame = chart.bounds
    assert (chart.across(10), chart.across(1000)) == (frame["left"], frame["right"])
    assert (chart.down(1), chart.down(100)) == (frame["bottom"], frame["top"])
    assert [label for _, label in chart.x_ticks] == ["10", "100"]
    assert [label for _, label in chart.y_ticks] == ["1", "10", "100"]
    assert chart.rule is None


def test_names_are_folded_in_the_order_in_which_they_come():
    tied = ["blocks.0.attn (a branch)", "stem (another)", "blocks.1.attn (a branch)", "blocks.2.mlp (a branch)"]
    folded = ["blocks.{0...1}.attn (a branch)", "stem (another)", "blocks.2.mlp (a branch)"]
    assert folded_names(tied) == folded
