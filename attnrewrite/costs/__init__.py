"""Costs as formulas in image size, checked to the integer against counts."""

from .count.cost import Cost
from .count.training import Training
from .report.analysis import analyze
from .report.comparison import ComparedSite, Comparison
from .report.hardware import Hardware, Roofline
from .report.report import Evaluation, Report
from .sites.model_formula import Check

__all__ = [
    "Check", "ComparedSite", "Comparison", "Cost", "Evaluation", "Hardware", "Report", "Roofline", "Training",
    "analyze",
]  # fmt: skip
