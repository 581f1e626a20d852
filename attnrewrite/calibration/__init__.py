"""Measure a conversion on real images, and recover what it lost."""

from .calibrate import calibrate, calibrated
from .settings import Calibration

__all__ = ["Calibration", "calibrate", "calibrated"]
