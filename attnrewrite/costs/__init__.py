"""Costs as formulas in image size, checked to the integer against counts."""

from .count.cost import Cost
from .count.training import Training
from .report.analysis import analyze
from .report.comparison import ComparedSite, Comparison
from .report.evaluation import Evaluation
from .report.hardware import Hardware
from .report.report import Report
from .report.roofline import Roofline
from .sites.model_formula import Check

__all__ = [
    "Check", "ComparedSite", "Comparison", "Cost", "Evaluation", "Hardware", "Report", "Roofline", "Training",
    "analyze",
]  # fmt: skip
