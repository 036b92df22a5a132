"""A look at training data before compute is spent on it."""
