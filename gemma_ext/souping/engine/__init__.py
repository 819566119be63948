"""Where the parts of a merge come from: resident tensors, or files in chunks."""
