"""Embeddings: one text to one vector, models/NAME/embed."""
