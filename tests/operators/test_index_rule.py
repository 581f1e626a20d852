"""The index rules, against their definitions written as loops."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from attention_oracle import axis_groups, axis_keys

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
    attended_slots,
    axis_blocks,
    axis_slots,
    check_partitions,
    map_slots,
    slots_of_tokens,
)

RULES = [
    AxisRule(length, kernel, stride, dilation, causal, offset, boundary)
    for length, kernel, dilation in product((1, 2, 7, 12, 13), (1, 2, 3, 4, 5), (1, 2, 3))
    for causal, boundary in ((False, "clamp"), (True, "clamp"), (False, "mask"))
    if kernel * dilation <= length or boundary == "mask"
    for stride in range(1, kernel + 1)
    for offset in {0, stride - 1}
]


@pytest.mark.parametrize("boundary", ["clamp", "mask"])
def test_windows_follow_the_definition(boundary):
    for rule in (rule for rule in RULES if rule.boundary == boundary):
        options = (rule.length, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal, rule.offset, boundary)
        expected = [axis_keys(query, *options) for query in range(rule.length)]
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
            centered = rule.boundary == "mask" and rule.stride == 1
            reach = rule.kernel_size // 2 if centered else rule.kernel_size - 1
            assert entries.tolist() == [step + reach for step in steps]
            assert rule.bias_length == (rule.kernel_size if centered else 2 * rule.kernel_size - 1)
            assert all(0 <= entry < rule.bias_length for entry in entries.tolist())


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
        (AxisRule(8, 3, 2, offset=2), r"offset 2 lies outside 0 \.\. 1 on axis 0: .* use 0"),
        (AxisRule(8, 3, 2, offset=-1), r"offset -1 lies outside 0 \.\. 1 on axis 0: .* use 1"),
        (AxisRule(8, 3, boundary="wrap"), "boundary must be one of clamp, mask, got 'wrap'"),
        (AxisRule(8, 3, is_causal=True, boundary="mask"), "is_causal needs boundary 'clamp' on axis 0"),
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
        (AxisPartition(8, 4, interval=0), "interval must be at least 1, got 0 for axis 0"),
        (AxisPartition(8, 2, 6, interval=3), r"shift 6 lies outside 0 \.\. 5 .* repeat with the region .* use 0"),
    ],
)
def test_partitions_without_meaning_are_refused(partition, message):
    with pytest.raises(ArgumentError, match=message):
        check_partitions((partition,))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [0, 1, 5, 8, 9])
@pytest.mark.parametrize(
    ("window", "shift", "interval"),
    [(1, 0, 1), (3, 0, 1), (3, 1, 1), (3, 2, 1), (4, 0, 1), (4, 3, 1), (2, 0, 3), (2, 4, 3), (3, 5, 2)],
)
def test_slots_and_blocks_say_the_same(length, window, shift, interval, padded):
    partition = AxisPartition(length, window, shift, padded, interval)
    table = axis_slots(partition)
    found = sorted(group for group in table.tolist() if max(group) >= 0)
    expected = sorted(_slots_of(block, partition) for block in axis_blocks(partition))
    assert found == expected
    assert attended_slots(partition) == int(((table >= 0).sum(1) * (table != ABSENT).sum(1)).sum())
    assert table.flatten()[slots_of_tokens(table, length)].tolist() == list(range(length))


def _slots_of(block, partition):
    tokens = range(block.start, block.start + block.tokens * partition.interval, partition.interval)
    present = [*tokens, *[PADDING] * (block.slots - block.tokens)]
    before = [ABSENT] * block.first_slot
    return before + present + [ABSENT] * (partition.window - len(before) - len(present))


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_slots_follow_the_definition(padded, rolled):
    """Loops over the definition give the same keys in the same slots of the same groups."""
    intervals = (1,) if rolled else (1, 2, 3)
    for length, window, interval in product((1, 2, 5, 8, 9, 12), (1, 2, 3, 4), intervals):
        for shift in range(window * interval):
            groups = {}
            for group, slot, token in axis_groups(length, window, shift, interval, padded, rolled):
                groups.setdefault(group, [ABSENT] * window)[slot] = PADDING if token == "padding" else token
            expected = sorted(group for group in groups.values() if max(group) >= 0)
            slots = axis_slots(AxisPartition(length, window, shift, padded, interval, rolled))
            assert sorted(group for group in slots.tolist() if max(group) >= 0) == expected


def test_a_rolled_partition_joins_the_first_tokens_with_the_last():
    """Five tokens rolled by one, then padded to six, in windows of three; the last window falls apart."""
    slots = axis_slots(AxisPartition(5, 3, 1, padded=True, rolled=True))
    assert slots.tolist() == [[1, 2, 3], [4, 0, ABSENT], [ABSENT, ABSENT, PADDING]]
    assert attended_slots(AxisPartition(5, 3, 1, padded=True, rolled=True)) == 3 * 3 + 2 * 2


@pytest.mark.parametrize("sides", [(1, 1), (4, 6), (5, 7)])
@pytest.mark.parametrize("interval", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_slots_of_a_map_are_pairs_of_those_of_its_axes(sides, interval, padded):
    rows, columns = (
        AxisPartition(side, 2, 1, padded, step) for side, step in zip(sides, interval, strict=True)
    )
    found = map_slots(rows, columns).tolist()
    expected = [
        [_on_map(row, column, sides[1]) for row in row_group for column in column_group]
        for row_group in axis_slots(rows).tolist()
        for column_group in axis_slots(columns).tolist()
    ]
    assert found == expected
    assert sorted(token for group in found for token in group if token >= 0) == list(range(sides[0] * sides[1]))


def _on_map(row, column, width):
    if ABSENT in (row, column):
        return ABSENT
    return PADDING if PADDING in (row, column) else row * width + column
