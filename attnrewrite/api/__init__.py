"""The calls a user makes."""
