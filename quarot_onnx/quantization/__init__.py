"""Numbers and choices: grids, activations, what of a graph is quantized."""
