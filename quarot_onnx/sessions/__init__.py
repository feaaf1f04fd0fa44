"""onnxruntime: sessions of files, and of graphs whose outputs were changed."""
