"""Tokens to text as they come.

A token need not be a character: the bytes of one may be spread over several, and whether a word has a space before it
may depend on the word before. So the whole is decoded, and what has been added is handed on, held back for as long as
it ends within a character, which decodes to U+FFFD. Of a long text the last tokens stand for the whole, from a place on
where no character was broken.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer  # type: ignore[import-untyped]

_BROKEN = "\ufffd"
_KEPT = 32
"""Tokens that are decoded again, at least, once there are so many."""


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
        self._mark = len(self._ids)
        self._told = len(self._decoded())

    def add(self, token: int) -> str:
        """What can be told once a token is added; empty where it ends within a character."""
        self._ids.append(token)
        text = self._decoded()
        if text.endswith(_BROKEN):
            return ""
        new = self._new(text)
        if len(self._ids) - self._mark > _KEPT:
            self._ids = self._ids[self._mark :]
            self._mark, self._told = len(self._ids), len(self._decoded())
        return new

    def rest(self) -> str:
        """What was held back, as it is."""
        return self._new(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        new = text[self._told :]
        self._told += len(new)
        return new
