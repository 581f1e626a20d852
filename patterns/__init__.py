"""What can be recognized and what it can become. Whatever lies in ``recognize`` and in ``targets`` is discovered."""
