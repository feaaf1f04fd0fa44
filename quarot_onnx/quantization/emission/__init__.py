"""The parts of :mod:`quarot_onnx.quantization.emit`: what is written for activations, weights and tables."""
