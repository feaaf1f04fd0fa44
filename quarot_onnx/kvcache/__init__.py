"""The key/value cache in few bits: as integers that the caller holds, or rounded and in float."""
