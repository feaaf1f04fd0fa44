"""Weights to integers: the methods (pure NumPy and SciPy), block by block, and what is kept between."""
