"""Whole backbones of timm at their own sizes: conversions that keep the function, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from random_weights import randomized
from target_donors import attention_rows, distance, logits

import attnrewrite

pytestmark = pytest.mark.slow

# name: sites that keep the function, and how many of each class
BACKBONES: list[tuple[str, str, dict[str, Any], dict[str, int]]] = [
    ("vit_tiny_patch16_224", "manhattan", {}, {"CONTINUOUS": 12}),
    ("vit_tiny_patch16_224", "long_short_distance", {"group_size": 14}, {"EXACT": 12}),
    ("pvt_v2_b0", "aggregated", {"pool": 1}, {"EXACT": 8}),
    ("pvt_v2_b2_li", "aggregated", {"pool": 1}, {"EXACT": 16}),
    ("swin_tiny_patch4_window7_224", "long_short_distance", {}, {"EXACT": 12}),
]


@pytest.mark.parametrize(("name", "target", "options", "classes"), BACKBONES, ids=lambda value: str(value))
def test_a_whole_backbone_keeps_its_function(
    name: str, target: str, options: dict[str, Any], classes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = randomized(timm.create_model(name, num_classes=10))
    converted = attnrewrite.convert(model, target, torch.randn(1, 3, 224, 224), **options)
    found = [row.exactness for row in attention_rows(converted)]
    assert {exactness: found.count(exactness) for exactness in set(found)} == classes
    batch = torch.randn(2, 3, 224, 224)
    assert distance(logits(converted, batch), logits(model, batch)) <= 2e-5
