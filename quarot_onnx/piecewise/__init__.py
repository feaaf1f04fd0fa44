"""A model that is larger than memory, run piece by piece: where it is cut, and its sessions one after the other."""
