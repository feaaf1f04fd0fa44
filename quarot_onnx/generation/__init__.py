"""Text from a model: prompts, a session with its cache, the next token, words as they come."""
