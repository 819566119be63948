"""Merging models: methods, recipes and the engines that run them."""
