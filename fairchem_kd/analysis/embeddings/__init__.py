"""A model's embeddings of structures, in a file."""
