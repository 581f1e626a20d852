"""The captured graph as values: what depends on what, where elements come from, what operators do to them."""
