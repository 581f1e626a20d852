"""Plain mathematics and randomness that everything stands on."""
