"""Recipes: rotation and quantization in one file, ours or LLMC's, or typed as options."""
