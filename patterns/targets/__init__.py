"""What sites can become: one file a target."""
