"""Questions and edits on graphs that know nothing of rotation."""
