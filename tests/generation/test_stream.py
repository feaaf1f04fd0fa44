"""Pieces of text make up the whole: characters of several tokens, spaces between words, tokens that are no text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quarot_onnx.calibration.tokenizer import load_tokenizer
from quarot_onnx.generation.stream import TextStream

TEXT = "Grüße, 世界 🙂!"


def pieces_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in ids), stream.rest()]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    return made


def test_a_character_of_several_tokens_comes_whole() -> None:
    tokenizer = byte_level()
    prompt, ids = tokenizer.encode("Say: ").ids, tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT.encode())
    pieces = pieces_of(tokenizer, prompt, ids)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_long_text_is_the_same_text() -> None:
    """Most of it is no longer decoded; where it is cut, no character is."""
    tokenizer, text = byte_level(), "Größe 世界🙂 " * 40
    assert "".join(pieces_of(tokenizer, tokenizer.encode("é" * 50).ids, tokenizer.encode(text).ids)) == text


def test_a_character_that_is_never_completed_comes_last() -> None:
    tokenizer = byte_level()
    *pieces, rest = pieces_of(tokenizer, [], tokenizer.encode("ab🙂").ids[:-1])
    assert pieces == ["a", "b", "", "", ""]
    assert set(rest) == {"\ufffd"}


def test_bytes_that_are_no_character_hold_nothing_up() -> None:
    tokenizer = byte_level()
    broken, after = tokenizer.encode("é").ids[0], tokenizer.encode("xyz").ids
    assert pieces_of(tokenizer, [], [broken, *after]) == ["", "\ufffdx", "y", "z", ""]


def test_a_special_token_is_no_text() -> None:
    tokenizer = byte_level()
    special = tokenizer.token_to_id("<s>")
    ids = tokenizer.encode("ab").ids
    assert pieces_of(tokenizer, [special], [ids[0], special, ids[1]]) == ["a", "", "b", ""]


def test_spaces_before_words() -> None:
    """A decoder that drops the space of the first word of a text does not drop it behind a prompt."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3, "▁three": 4}, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    assert pieces_of(made, [1], [2, 3, 4]) == [" two", "s", " three", ""]
    assert pieces_of(made, [], [2, 3, 4]) == ["two", "s", " three", ""]


def test_bytes_that_a_tokenizer_falls_back_to() -> None:
    vocabulary = {"<unk>": 0, "▁a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    ids = [2 + byte for byte in "é".encode()]
    assert pieces_of(made, [1], [*ids, 1]) == ["", "é", " a", ""]
    # A run of bytes is decoded as a whole, or not at all.
    assert "".join(pieces_of(made, [1], ids * 200)) == "é" * 200


def test_spaces_before_words_of_a_long_text() -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3}, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    assert "".join(pieces_of(made, [1], [2, 3, 1] * 60)) == " twos one" * 60


def test_the_tokenizer_of_the_tiny_models(llama_optimum) -> None:
    tokenizer = load_tokenizer(llama_optimum.parent)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert "".join(pieces_of(tokenizer, [256], ids)) == TEXT
