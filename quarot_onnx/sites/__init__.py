"""Where rotations go."""
