"""Learning mechanisms and the engine that fine-tunes many adapters at once. Plain PyTorch, no Ray."""
