"""What ``to`` may be: names, options, target objects and mappings."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.patterns.targets.neighborhood import Neighborhood
from model_queries import run

import attnrewrite
from attnrewrite.errors import ArgumentError


def test_a_mapping_gives_every_site_its_target(vit, batch):
    targets = {"blocks.0.*": "identity", "blocks.1.attn": Neighborhood(kernel_size=3)}
    report = attnrewrite.report(attnrewrite.convert(vit, targets, batch))
    chosen = {site.name: (site.target, site.exactness) for site in report.converted}
    assert chosen == {
        "blocks.0.attn": ("identity", "EXACT"),
        "blocks.0.mlp": ("identity", "EXACT"),
        "blocks.1.attn": ("neighborhood", "PROJECTED"),
    }


def test_the_first_match_of_a_mapping_wins(vit, batch):
    given = {"*.1.*": Neighborhood(kernel_size=3), "*": "identity"}
    report = attnrewrite.report(attnrewrite.convert(vit, given, batch))
    targets = {site.name: site.target for site in report.converted if site.kind == "attention"}
    assert targets == {"blocks.0.attn": "identity", "blocks.1.attn": "neighborhood"}


def test_a_target_object_equals_its_name_with_options(vit, batch, projected):
    converted = attnrewrite.convert(vit, Neighborhood(kernel_size=3), batch)
    assert torch.equal(run(converted, batch), run(projected, batch))


def test_options_reach_the_target(vit, batch):
    report = attnrewrite.report(attnrewrite.convert(vit, "neighborhood", batch, kernel_size=(1, 2), dilation=2))
    assert report.converted[0].settings == {"kernel_size": (1, 2), "dilation": (2, 2)}


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ({}, {}, r"to: the mapping is empty"),
        ({"*": "neighborhood"}, {"kernel_size": 3}, r"to: options \['kernel_size'\] belong into the mapping's target"),
        ({"block.0.attn": "identity"}, {}, r"to: 'block\.0\.attn' matches no site; did you mean 'blocks\.0\.attn'"),
        ({"*": "neighbourhood"}, {}, r"to: unknown target 'neighbourhood'; did you mean 'neighborhood'"),
        (Neighborhood(3), {"kernel_size": 5}, r"to: options \['kernel_size'\] go into the target object"),
        ("neighbourhood", {}, r"to: unknown target 'neighbourhood'; did you mean 'neighborhood'\?"),
        ("xyz", {}, r"to: unknown target 'xyz'.*known targets: .*identity.*neighborhood"),
        (3, {}, r"to: unknown target 3"),
        (Neighborhood, {}, r"to: "),
        ("neighborhood", {"kernel_sz": 3}, r"to: .* does not take \['kernel_sz'\]; it takes: kernel_size"),
        ("identity", {"kernel_size": 3}, r"to: target 'identity' does not take \['kernel_size'\]"),
        ("neighborhood", {"kernel_size": 0}, r"kernel_size: .*at least 1.* got (\(0, )?0"),
        ("neighborhood", {"kernel_size": (3, -1)}, r"kernel_size: .*at least 1.* got \(3, -1\)"),
        ("neighborhood", {"dilation": 0}, r"dilation: .*at least 1"),
        ("neighborhood", {"oversize": "shrink"}, r"oversize: expected 'clamp' or 'error', got 'shrink'"),
        ("dilated_neighborhood", {"kernel_size": 0}, r"kernel_size: .*at least 1"),
        ("dilated_neighborhood", {"dilation": -1}, r"dilation: .*at least 1"),
        ("dilated_neighborhood", {"oversize": "shrink"}, r"oversize: expected 'clamp' or 'error'"),
        ("neighborhood", {"kernel_size": "3"}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": 2.5}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": (3,)}, r"kernel_size: "),
        ("neighborhood", {"kernel_size": (3, 3, 3)}, r"kernel_size: "),
        ("neighborhood", {"dilation": None}, r"dilation: "),
    ],
)
def test_targets_without_meaning_are_refused(vit, batch, to, options, message):
    with pytest.raises(ArgumentError, match=message):
        attnrewrite.convert(vit, to, batch, **options)
