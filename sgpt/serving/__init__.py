"""A model behind HTTP: embeddings, re-ranking and a search page, computed by one thread in batches of many requests."""
