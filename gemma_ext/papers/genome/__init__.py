"""Nature-Inspired Population-Based Evolution of Large Language Models (arXiv 2503.01155)."""
