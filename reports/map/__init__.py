"""A map of embeddings: their first two principal components."""
