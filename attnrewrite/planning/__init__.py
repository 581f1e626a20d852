"""What will become of a model: a plan, made stage by stage."""
