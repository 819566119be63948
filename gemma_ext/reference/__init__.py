"""Plain torch twins of every op: from the formulas, float64-capable, nothing fused."""
