"""Which implementation serves a call."""

from __future__ import annotations


def is_reference(impl: str) -> bool:
    """Whether `impl` asks for the formulas in plain torch."""
    if impl not in ("auto", "reference"):
        raise ValueError(f"expected impl to be 'auto' or 'reference', got {impl!r}")
    return True
