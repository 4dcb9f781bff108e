"""Training the Grad-Transformer with Ray Train on tuples that Ray Data streams from the store."""
