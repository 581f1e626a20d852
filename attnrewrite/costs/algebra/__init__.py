"""Costs as sympy expressions: their symbols, what is asked of them, and the formula of every building block."""
