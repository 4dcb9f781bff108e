"""gt-ray: turn the update of a small language model, fine-tuned on private data, into an update of a large one.

Importing this package imports no Ray, vLLM, DeepSpeed or Opacus; the modules that need them say which extra is missing.
"""

__version__ = "0.1.0"
