"""Recognized sites and whole models as formulas in the image's sides, checked against the counts."""
