"""Peaks and bandwidths of accelerators, and where a cost lies under their roof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ArgumentError, nearest


@dataclass(frozen=True)
class Hardware:
    """A machine's roof.

    Args:
        name: for display.
        peak: dense (not sparse) operations a second by dtype, e.g. ``{"bfloat16": 989e12}``; a FLOP is half a MAC.
        bandwidth: bytes a second of device memory.
        source: where the figures are from.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    source: str = "given by the user"

    def ridge(self, dtype: str) -> float:
        """FLOP/byte at which compute and bandwidth limit alike.

        Raises:
            ArgumentError: no peak for this dtype is known.
        """
        if dtype not in self.peak:
            raise ArgumentError(
                f"dtype: {self.name} has peaks for {', '.join(self.peak)}, got {dtype!r}; pass "
                "hardware=Hardware(name, peak={...}, bandwidth=...)"
            )
        return self.peak[dtype] / self.bandwidth

    def bound(self, flops: float, size: float, dtype: str) -> float:
        """The least seconds that ``flops`` over ``size`` bytes can take: a bound, not an estimate."""
        return max(flops / self.peak[dtype], size / self.bandwidth)


def _nvidia(name: str, half: float, single: float, bandwidth: float) -> Hardware:
    peak = {"float16": half * 1e12, "bfloat16": half * 1e12, "float32": single * 1e12}
    return Hardware(name, peak, bandwidth * 1e9, "NVIDIA data sheet, dense rates without sparsity")


HARDWARE = {
    "h200": _nvidia("H200 SXM", 989.4, 66.9, 4800),
    "h100": _nvidia("H100 SXM", 989.4, 66.9, 3350),
    "a100": _nvidia("A100 SXM 80 GB", 311.9, 19.5, 2039),
    "l4": _nvidia("L4", 121.0, 30.3, 300),
}


def hardware_of(given: str | Hardware) -> Hardware:
    """Raises:
    ArgumentError: unknown name.
    """
    if isinstance(given, Hardware):
        return given
    if not isinstance(given, str) or given.lower() not in HARDWARE:
        raise ArgumentError(
            f"hardware: not in the table ({', '.join(HARDWARE)}), got {given!r}{nearest(str(given), HARDWARE)}; "
            "or pass Hardware(name, peak={'bfloat16': ...}, bandwidth=...)"
        )
    return HARDWARE[given.lower()]
