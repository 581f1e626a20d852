"""Certify: a site's lifted form against the captured subgraph, on random and on captured values."""

from .certificate import Certificate, certify, collect_values, run_through

__all__ = ["Certificate", "certify", "collect_values", "run_through"]
