"""Curation: shadow plan, fine-tunes as keyed jobs, and the Ray Data pipeline that runs them into the store."""
