"""Low-bit rounding of weights: pure NumPy and SciPy, (W, statistics, scheme) to integers, scales and zero points."""
