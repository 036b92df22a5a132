"""What a model is worth: its metrics next to BM25's, with intervals."""
