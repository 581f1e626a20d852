"""Kernels in C++ for CPUs: compiled in a wheel or on the spot (``python -m attnrewrite build``), and optional."""
