"""Published methods, one module each."""
