"""Costs as sympy expressions: their symbols, what is asked of them, the formulas of building blocks, and how cores and
modules state theirs."""
