"""From Hugging Face folders and GGUF files to ONNX, in a child process."""
