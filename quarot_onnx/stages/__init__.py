"""A model piece by piece: where it is cut, and the run from cut to cut."""
