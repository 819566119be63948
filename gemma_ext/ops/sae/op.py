"""The encode ops as torch sees them: fakes, derivatives, FLOPs."""
