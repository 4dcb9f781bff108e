"""Base models, their tokenizers, roots, and the embedded pair. Plain PyTorch; may import `config`, `updates.layout`."""
