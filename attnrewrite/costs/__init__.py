"""Costs as formulas in image size, checked to the integer against counts."""

from .comparison import ComparedSite, Comparison
from .cost import Cost
from .derive import Check
from .driver import analyze
from .hardware import Hardware, Roofline
from .report import Evaluation, Report
from .training import Training

__all__ = [
    "Check", "ComparedSite", "Comparison", "Cost", "Evaluation", "Hardware", "Report", "Roofline", "Training",
    "analyze",
]  # fmt: skip
