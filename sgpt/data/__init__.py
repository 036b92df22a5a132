"""Training data and test sets: formats on disk, sources by name, the feed of batches."""
