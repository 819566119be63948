"""Recipes in mergekit's YAML: read, resolved, looked through and run."""
