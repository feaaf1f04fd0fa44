import json
import pickle

import numpy as np
import pytest
import tiny_decoders as tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from quarot_onnx.calibration import text
from quarot_onnx.errors import CalibrationError, ShortTextError


@pytest.fixture
def folder(tmp_path):
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_windows_follow_each_other():
    cut = text.windows(list(range(2, 12)), length=4, count=3, bos_id=1)
    np.testing.assert_array_equal(cut, [[1, 2, 3, 4], [1, 5, 6, 7], [1, 8, 9, 10]])
    np.testing.assert_array_equal(text.windows(list(range(10)), length=4, count=None), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_text_is_tokenized_without_special_tokens(folder):
    tokenizer = text.load_tokenizer(folder)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    np.testing.assert_array_equal(text.windows("w5 w6 other", tokenizer, length=3, count=1), [[5, 6, 0]])


def test_saved_truncation_and_padding_are_not_obeyed(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9, pad_id=2, pad_token="w2")
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = text.load_tokenizer(folder)
    assert text.tokenize("w5 w6 w7 w8 w9", loaded).tolist() == [5, 6, 7, 8, 9]
    assert text.tokenize("w5", loaded).tolist() == [5]
    with pytest.raises(CalibrationError, match="there are 5"):
        text.windows("w5 w6 w7 w8 w9", loaded, length=9, count=1)


def test_a_bos_in_the_text_is_not_put_there_twice(folder):
    for ids, wanted in (
        ([1, 5, 6, 7, 8, 9], [[1, 5, 6], [1, 7, 8]]),
        ([5, 6, 1, 7, 8], [[1, 5, 6], [1, 7, 8]]),
        ([1, 1, 5, 6, 7], [[1, 1, 5], [1, 6, 7]]),
    ):
        np.testing.assert_array_equal(text.windows(ids, length=3, count=2, bos_id=1), wanted)
    np.testing.assert_array_equal(text.windows([1, 5, 6], length=3, count=1), [[1, 5, 6]])
    tokenizer = text.load_tokenizer(folder)
    tokenizer.add_special_tokens(["<s>"])
    np.testing.assert_array_equal(text.windows("<s> w5 w6", tokenizer, length=3, count=None, bos_id=1), [[1, 5, 6]])
    with pytest.raises(CalibrationError, match=r"2 windows of 3 need 4 .* are 3: ask for 1 window"):
        text.windows([1, 5, 6, 7], length=3, count=2, bos_id=1)


def test_too_little_text_says_how_much_there_is(folder):
    with pytest.raises(CalibrationError, match=r"2 windows of 4 need 6 .* are 4: ask for 1 window, or give"):
        text.windows("w5 w6 w7 w8", text.load_tokenizer(folder), length=4, count=2, bos_id=1)
    with pytest.raises(CalibrationError, match=r"3 windows of 2 need 6 .* are 5: ask for 2 windows, or give more"):
        text.windows("w5 w6 w7 w8 w9", text.load_tokenizer(folder), length=2, count=3)
    with pytest.raises(CalibrationError, match=rf"{10**30} windows of 2 need .* are 5: ask for 2 windows"):
        text.windows("w5 w6 w7 w8 w9", text.load_tokenizer(folder), length=2, count=10**30)
    for count, need in ((2, "2 windows of 8 need 16"), (1, "1 window of 8 needs 8"), (None, "1 window of 8 needs 8")):
        with pytest.raises(CalibrationError, match=rf"{need} .* are 4: ask for shorter windows, or give more text"):
            text.windows("w5 w6 w7 w8", text.load_tokenizer(folder), length=8, count=count)


def test_ids_outside_the_vocabulary(folder):
    with pytest.raises(CalibrationError, match=r"token id 31 .* vocabulary of 20 \(the tokenizer has 32\)"):
        text.windows("w5 w31", text.load_tokenizer(folder), length=2, count=1, vocab_size=20)


def test_empty_text(folder):
    with pytest.raises(CalibrationError, match=r"empty.*: give some text"):
        text.windows("", text.load_tokenizer(folder), length=2, count=1)


def test_a_tokenizer_is_found_or_missed_by_name(folder, tmp_path):
    assert text.load_tokenizer(folder / "tokenizer.json").get_vocab_size() == tiny.VOCAB
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"holds no tokenizer.json"):
        text.load_tokenizer(tmp_path / "empty")
    with pytest.raises(CalibrationError, match="no tokenizer at"):
        text.load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"is no tokenizer\.json"):
        text.load_tokenizer(tmp_path / "other.json")


def test_text_files(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(CalibrationError, match="cannot be read"):
        text.read_text(path)
    path.write_bytes(b"a\xff")
    with pytest.raises(CalibrationError, match=r"not UTF-8 \(byte 1\)"):
        text.read_text(path)
    path.write_text(" \n")
    with pytest.raises(CalibrationError, match="is empty: name a file with text in it"):
        text.read_text(path)
    path.write_bytes(b"a\r\nb")
    assert text.read_text(path) == "a\r\nb"


@pytest.mark.parametrize(
    ("files", "bos"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, 1),
        ({"tokenizer_config.json": {"bos_token": {"content": "<s>"}}}, 1),
        ({"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False}}, None),
        ({"special_tokens_map.json": {"bos_token": {"content": "w7"}}}, 7),
        ({"config.json": {"bos_token_id": 3}}, 3),
        ({"genai_config.json": {"model": {"bos_token_id": 4}}}, 4),
        ({"tokenizer_config.json": {"bos_token": "<s>"}, "config.json": {"bos_token_id": 3}}, 1),
    ],
)
def test_bos(folder, files: dict, bos: int | None):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert text.find_bos(folder) == bos


def test_bos_from_the_post_processor(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert text.find_bos(folder) == 1
    assert text.resolve_bos(folder, text.Bos.NONE) is None
    assert text.resolve_bos(folder, 9) == 9


def test_unknown_bos_token(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    with pytest.raises(CalibrationError, match="'<bos>'"):
        text.find_bos(folder)


def test_default_text_is_long_prose():
    prose = text.default_text()
    assert len(prose) > 300_000
    assert prose == text.default_text()


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))


def _merges_across_words() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return _trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"], max_token_length=16),
    )


def _unigrams() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    return _trained(tokenizer, trainer)


def _word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]"])
    return _trained(tokenizer, trainer)


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([text.default_text()[:20_000]], trainer)
    return tokenizer


@pytest.mark.parametrize("kind", [_bytes, _merges_across_words, _unigrams, _word_pieces])
def test_the_first_tokens_are_those_of_the_whole_text(kind):
    tokenizer, prose = kind(), text.default_text()[:40_000]
    whole = text.tokenize(prose, tokenizer)
    for first in (1, 2, 100, 1_000, *np.random.default_rng(0).integers(1, 5_000, 8)):
        found = text.tokenize(prose, tokenizer, first)
        assert first <= found.size < whole.size
        np.testing.assert_array_equal(found, whole[: found.size])
    np.testing.assert_array_equal(text.tokenize(prose, tokenizer, whole.size), whole)
    np.testing.assert_array_equal(text.tokenize(prose, tokenizer, whole.size + 1), whole)


def test_a_text_of_few_tokens_is_read_on(folder):
    """Of words that are long, and in a text that says much of one thing."""
    tokenizer = text.load_tokenizer(folder)
    prose = f"{'w5' + ' ' * 40}" * 4_000
    found = text.tokenize(prose, tokenizer, 1_000)
    assert 1_000 <= found.size < 4_000
    assert set(found.tolist()) == {5}
    with pytest.raises(CalibrationError, match=r"40 windows of 101 need 4040 .* are 4000: ask for 39 windows"):
        text.windows(prose, tokenizer, length=101, count=40)


def test_what_is_no_character():
    with pytest.raises(CalibrationError, match=r"^the text is not UTF-8 \(byte 0xe9 behind 'w3 '\): convert it first"):
        text.windows("w3 \udce9", tiny.tokenizer(), length=1, count=1)


def test_an_error_of_a_short_text_goes_between_processes():
    with pytest.raises(ShortTextError, match="needs 2 tokens of text, there are 1: give more text") as raised:
        text.windows([1], length=2, count=1)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (type(again), str(again), again.reason) == (ShortTextError, str(raised.value), raised.value.reason)
