"""The ways to run an operator: one file or folder each. Whatever lies here is discovered."""
