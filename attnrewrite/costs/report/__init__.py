"""What ``analyze`` returns: the costs of a model, comparisons with others, and views of both."""
