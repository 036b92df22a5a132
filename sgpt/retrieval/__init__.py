"""Search: BM25, embeddings, indexes, fusion, re-ranking, and the metrics of rankings."""
