"""SmoothQuant: scales that move what is hard to quantize from activations into weights."""
