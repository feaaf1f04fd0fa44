"""QuaRot rotations and quantization for ONNX language models."""
