"""A training run, from negatives and loss to checkpoints and what a run leaves to read."""
