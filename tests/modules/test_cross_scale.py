"""Cross-scale embedding against single convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnrewrite.errors import ArgumentError
from attnrewrite.modules.cross_scale import CrossScaleMerge, CrossScaleStem, scale_widths


def test_channels_halve_and_the_last_two_are_equal():
    assert scale_widths(96, 4) == [48, 24, 12, 12]
    assert scale_widths(64, 2) == [32, 32]
    assert scale_widths(8, 1) == [8]


def test_a_small_filter_in_the_center_of_each_kernel_is_that_filter():
    stem = CrossScaleStem(dim=16, norm=False).double()
    small = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    start = 0
    for conv in stem.projs:
        edge, end = conv.padding[0], start + conv.out_channels
        conv.weight.data = F.pad(small[start:end], (edge,) * 4)
        conv.bias.data.zero_()
        start = end
    image = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    torch.testing.assert_close(stem(image), F.conv2d(image, small, stride=4).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("height", "width"), [(7, 8), (5, 5), (6, 9)])
def test_a_merge_rounds_odd_sides_up(height, width):
    merge = CrossScaleMerge(8).double()
    source = torch.randn(2, height, width, 8, dtype=torch.float64)
    merged = merge(source)
    assert merged.shape == (2, (height + 1) // 2, (width + 1) // 2, 16)
    inner = merge(source[:, : height // 2 * 2, : width // 2 * 2])
    rows, columns = height // 2 - 1, width // 2 - 1
    torch.testing.assert_close(merged[:, :rows, :columns], inner[:, :rows, :columns])


def test_export_for_any_size():
    merge = CrossScaleMerge(8).eval()
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(merge, (torch.randn(2, 9, 12, 8),), dynamic_shapes=(sizes,)).module()
    source = torch.randn(3, 16, 13, 8)
    torch.testing.assert_close(program(source), merge(source))


@pytest.mark.parametrize("kernels", [(), (8, 4), (4, 7), (2, 4)])
def test_kernels_without_a_common_center_are_refused(kernels):
    with pytest.raises(ArgumentError, match="kernel_sizes"):
        CrossScaleStem(dim=16, kernel_sizes=kernels, stride=4)


def test_a_width_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ArgumentError, match="dim: must be a multiple of 8"):
        CrossScaleStem(dim=20)
