"""The product ops as torch sees them."""
