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
    ABSENT,
    PADDING,
    AxisBlock,
    AxisPartition,
    Grouping,
    attended_slots,
    axis_blocks,
    axis_slots,
    check_partitions,
    cropped_map,
    from_groups,
    into_groups,
    map_slots,
    padded_map,
    visible_keys,
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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 5, 8, 9])
@pytest.mark.parametrize(("window", "shift"), [(1, 0), (3, 0), (3, 1), (3, 2), (4, 0), (4, 3)])
def test_slots_and_blocks_say_the_same(length, window, shift, padded):
    partition = AxisPartition(length, window, shift, padded)
    slots = [group for group in axis_slots(partition).tolist() if max(group) >= 0]
    for block, group in zip(axis_blocks(partition), slots, strict=True):
        present = group[block.first_slot : block.first_slot + block.slots]
        assert present[: block.tokens] == list(range(block.start, block.start + block.tokens))
        assert set(present[block.tokens :]) <= {PADDING}
        assert [slot for slot in group if slot != ABSENT] == present
    table = axis_slots(partition)
    assert attended_slots(partition) == int(((table >= 0).sum(1) * (table != ABSENT).sum(1)).sum())


def test_a_rolled_partition_joins_the_first_tokens_with_the_last():
    """Five tokens rolled by one, then padded to six, in windows of three; the last window falls apart."""
    slots = axis_slots(AxisPartition(5, 3, 1, padded=True, cyclic=True))
    assert slots.tolist() == [[1, 2, 3], [4, 0, ABSENT], [ABSENT, ABSENT, PADDING]]
    assert attended_slots(AxisPartition(5, 3, 1, padded=True, cyclic=True)) == 3 * 3 + 2 * 2


@pytest.mark.parametrize("sides", [(1, 1), (4, 6), (5, 7), (12, 12)])
@pytest.mark.parametrize("group", [(2, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("interval", [(1, 1), (2, 1), (2, 3)])
def test_views_of_a_map_and_slots_say_the_same(sides, group, interval):
    grouping = Grouping.covering(sides, group, interval)
    tokens = torch.arange(1, sides[0] * sides[1] + 1).view(1, *sides, 1)
    groups = into_groups(padded_map(tokens, grouping), grouping)
    axes = [
        AxisPartition(*each[:2], interval=each[2]) for each in zip(sides, group, interval, strict=True)
    ]
    members = groups[0, :, :, 0] - 1
    assert sorted(members.tolist()) == sorted(map_slots(*axes).tolist())
    assert len(members) == grouping.groups
    assert torch.equal(visible_keys(grouping, *sides, tokens.device), members >= 0)
    assert torch.equal(cropped_map(from_groups(groups, grouping), grouping), tokens)


def test_a_centered_grouping_pads_in_front_too():
    grouping = Grouping.covering((5, 4), (4, 4), (1, 1), centered=True)
    assert (grouping.before, grouping.after) == ((1, 0), (2, 0))
