"""Rewrite: the smallest module around a site runs a graph in which the site became one call."""
