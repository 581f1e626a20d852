"""Random windows of hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from attnrewrite.ir.sites import Window


@st.composite
def padded_windows(draw: st.DrawFn, longest_side: int) -> Window:
    """Of any shift, with padding keys, rolled before or after padding."""
    rows, columns = draw(st.integers(1, longest_side)), draw(st.integers(1, longest_side))
    shift = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    return Window((rows, columns), shift, padding_keys=True, rolled_first=draw(st.booleans()))
