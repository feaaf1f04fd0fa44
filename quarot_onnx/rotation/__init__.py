"""How a model is rotated."""
