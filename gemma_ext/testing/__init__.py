"""Helpers that tests and benchmarks share."""

from gemma_ext.testing.compare import Difference, assert_close, difference
from gemma_ext.testing.poison import poisoned_empty

__all__ = ["Difference", "assert_close", "difference", "poisoned_empty"]
