"""The rotation_config.json file: three dialects, and the places that they name."""
