"""The Grad-Transformer: network, standardisation, loss, generation (section 4.2). Plain PyTorch, no Ray."""
