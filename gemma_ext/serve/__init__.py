"""Serving: an engine that batches rows of any depth, and an OpenAI-compatible server over it."""
