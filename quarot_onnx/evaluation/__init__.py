"""Equivalence, perplexity, speed, and what a model is."""
