"""The quantized graph: what is written for activations, weights and tables."""
