"""Models as files: read without their weights, written whole or not at all."""
