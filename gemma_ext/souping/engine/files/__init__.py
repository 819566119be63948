"""Checkpoints on disk: what is in them, and how they are written."""
