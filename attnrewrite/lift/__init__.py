"""Attention read off a captured graph."""
