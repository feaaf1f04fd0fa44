"""What a run of the pipeline consists of."""
