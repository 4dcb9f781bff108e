"""Updates: layout (tensors to [L, d] and back), update files and adapter folders, the store, pooling. No Ray here."""
