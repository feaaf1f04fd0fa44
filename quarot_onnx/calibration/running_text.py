"""Whether a text looks like running text, which a perplexity means something on.

A release of WikiText has ``<unk>`` in place of one word in eighteen. Any model predicts it easily, however damaged: a
perplexity on such text hides most of what few bits cost. The same goes for tables, logs and JSON.
"""

from collections import Counter

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.text import TokenIds

_LOOKED_AT = 20_000
"""Tokens, from the start."""

_LARGEST_SHARE = 0.08
"""Of one token. Seen with a vocabulary of 49,152: 4 % in an encyclopedia, 6 % in source code, 14 % in JSON."""

_SMALLEST_VOCABULARY = 1000
"""Tokens of smaller ones are letters, some of which are frequent in any text."""

_UNKNOWN = ("<unk>", "[UNK]", "<UNK>")
_UNKNOWN_SHARE = 0.005
"""Of all words."""


def running_text_note(ids: TokenIds, tokenizer: Tokenizer, what: str) -> tuple[str, ...]:
    """What the user should know of a text, if anything.

    Args:
        ids: Its token ids, of any shape.
        tokenizer: What they were made with.
        what: The text, in words.

    Returns:
        One note, or none.
    """
    looked_at = ids.ravel()[:_LOOKED_AT].tolist()
    words = tokenizer.decode(looked_at, skip_special_tokens=False).split()
    for unknown in _UNKNOWN:
        count = sum(word.count(unknown) for word in words)
        if count > _UNKNOWN_SHARE * len(words):
            return (_note(what, f"one word in {len(words) / count:.0f} is {unknown}"),)
    token, count = Counter(looked_at).most_common(1)[0]
    if count > _LARGEST_SHARE * len(looked_at) and tokenizer.get_vocab_size() >= _SMALLEST_VOCABULARY:
        shown = tokenizer.decode([token], skip_special_tokens=False)
        return (_note(what, f"the token {shown!r} is {count / len(looked_at):.0%} of it"),)
    return ()


def _note(what: str, why: str) -> str:
    return (
        f"{what} is unlike running text: {why}; any model predicts that easily, so that figures on it hide what "
        "quantization costs"
    )
