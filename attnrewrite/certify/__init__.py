"""Certify: a site's lifted form against the captured subgraph, on random and on captured values."""

from .certificate import Certificate, certify, certify_running, collect_values

__all__ = ["Certificate", "certify", "certify_running", "collect_values"]
