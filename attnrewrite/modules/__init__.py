"""The papers' operators as modules: projections and all, usable alone, for maps of any size."""
