"""What can be recognised and what it can become. Whatever lies in `recognise` and in `targets` is discovered."""
