"""Tokens to text as they come.

A token need not be a character: the bytes of one may be spread over several, and whether a word has a space before it
may depend on the word before. So the whole is decoded, and what has been added is handed on, held back for as long as
it ends within a character, which decodes to U+FFFD.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer  # type: ignore[import-untyped]

_BROKEN = "\ufffd"


class TextStream:
    """The text of what is generated, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: The tokenizer.
            prompt: The prompt's tokens.
        """
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._told = len(self._decoded())

    def add(self, token: int) -> str:
        """What can be told once a token is added; empty where it ends within a character."""
        self._ids.append(token)
        text = self._decoded()
        return "" if text.endswith(_BROKEN) else self._new(text)

    def rest(self) -> str:
        """What was held back, as it is."""
        return self._new(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new = text[self._told :]
        self._told += len(new)
        return new
