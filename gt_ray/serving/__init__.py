"""Serving: generated adapters in vLLM and in ray.serve.llm, by name."""
