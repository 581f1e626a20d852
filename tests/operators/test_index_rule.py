"""The index rules, against their definitions written as loops."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from attention_oracle import axis_keys

from attnrewrite.errors import ArgumentError
from attnrewrite.operators.index_rule import (
    AxisRule,
    attended_pairs,
    axis_table,
    check_rules,
    per_axis,
    windows,
)
from attnrewrite.operators.partition_rule import (
    AxisBlock,
    AxisPartition,
    attended_slots,
    axis_blocks,
    check_partitions,
)

RULES = [
    AxisRule(length, kernel, stride, dilation, causal)
    for length, kernel, dilation, causal in product(
        (1, 2, 7, 12, 13), (1, 2, 3, 4, 5), (1, 2, 3), (False, True)
    )
    if kernel * dilation <= length
    for stride in range(1, kernel + 1)
]


@pytest.mark.parametrize("causal", [False, True])
def test_windows_follow_the_definition(causal):
    for rule in (rule for rule in RULES if rule.is_causal == causal):
        expected = [
            axis_keys(query, rule.length, rule.kernel_size, rule.stride, rule.dilation, causal)
            for query in range(rule.length)
        ]
        assert [list(window) for window in windows(rule)] == expected, rule
        assert attended_pairs(rule) == sum(map(len, expected)), rule


def test_tables_hold_the_windows_and_their_bias_entries():
    for rule in RULES:
        table = axis_table(rule, torch.device("cpu"))
        assert table.keys.dtype == table.bias_index.dtype == torch.int64
        assert table.keys.min() >= 0
        assert table.keys.max() < rule.length
        for query, window in enumerate(windows(rule)):
            seen = table.keys[query][table.valid[query]]
            entries = table.bias_index[query][table.valid[query]]
            assert seen.tolist() == list(window)
            steps = [(key - query) // rule.dilation for key in window]
            assert entries.tolist() == [step + rule.kernel_size - 1 for step in steps]
            assert all(0 <= entry < 2 * rule.kernel_size - 1 for entry in entries.tolist())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (AxisRule(8, 0), "kernel_size must be at least 1, got 0 for axis 0"),
        (AxisRule(8, 3, 0), "stride must be at least 1, got 0"),
        (AxisRule(8, 3, 1, 0), "dilation must be at least 1, got 0"),
        (AxisRule(8, 3, 4), "stride 4 exceeds kernel_size 3 on axis 0.*stride of at most 3"),
        (
            AxisRule(8, 9),
            "kernel_size 9 x dilation 1 exceeds the 8 tokens of axis 0: use a kernel_size of at most 8",
        ),
        (AxisRule(8, 3, 1, 3), "kernel_size 3 x dilation 3 exceeds the 8 tokens.*kernel_size of at most 2"),
        (AxisRule(3, 2, 1, 5), "use a dilation of at most 1"),
    ],
)
def test_rules_without_meaning_are_refused(rule, message):
    with pytest.raises(ArgumentError, match=message):
        check_rules((rule,))


def test_per_axis_spreads_or_counts():
    assert per_axis(3, 2, "kernel_size") == (3, 3)
    assert per_axis([3, 5], 2, "kernel_size") == (3, 5)
    with pytest.raises(ArgumentError, match="kernel_size has 3 entries for a 2-D map"):
        per_axis((3, 3, 3), 2, "kernel_size")


def test_blocks_of_a_partition():
    assert axis_blocks(AxisPartition(9, 4)) == (
        AxisBlock(0, 4, 0, 4),
        AxisBlock(4, 4, 0, 4),
        AxisBlock(8, 1, 0, 1),
    )
    assert axis_blocks(AxisPartition(9, 4, shift=1, padded=True)) == (
        AxisBlock(0, 1, 3, 1),
        AxisBlock(1, 4, 0, 4),
        AxisBlock(5, 4, 0, 4),
    )
    assert axis_blocks(AxisPartition(2, 7, shift=3, padded=True)) == (AxisBlock(0, 2, 4, 3),)
    assert attended_slots(AxisPartition(9, 4, padded=True)) == 4 * 4 + 4 * 4 + 1 * 4


@pytest.mark.parametrize("length", [1, 5, 8, 9])
@pytest.mark.parametrize(("window", "shift"), [(1, 0), (3, 0), (3, 1), (3, 2), (4, 0), (4, 3)])
def test_blocks_cover_every_token_once(length, window, shift):
    blocks = axis_blocks(AxisPartition(length, window, shift))
    covered = [
        (token, (token - shift) // window) for b in blocks for token in range(b.start, b.start + b.tokens)
    ]
    assert [token for token, _ in covered] == list(range(length))
    assert len({block for _, block in covered}) == len(blocks)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (AxisPartition(8, 0), "window_size must be at least 1, got 0 for axis 0"),
        (AxisPartition(8, 4, 4), r"shift 4 lies outside 0 \.\. 3 on axis 0: .* use 0"),
        (AxisPartition(8, 4, -1), r"shift -1 lies outside 0 \.\. 3 on axis 0: .* use 3"),
    ],
)
def test_partitions_without_meaning_are_refused(partition, message):
    with pytest.raises(ArgumentError, match=message):
        check_partitions((partition,))
