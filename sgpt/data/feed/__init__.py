"""Examples to batches: stored once, tokenised once, drawn by seed and number alone."""
