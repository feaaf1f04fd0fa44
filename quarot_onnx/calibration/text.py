"""Text to windows of token ids.

The text is tokenized whole, without special tokens, and cut into windows that do not overlap; the customary way for
WikiText perplexity. With a BOS id every window is ``[BOS] + length - 1`` tokens of text: models trained with a leading
BOS park their attention there, and without it their activations and perplexity are those of another regime.
"""

import enum
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.companions import read_json
from quarot_onnx.errors import CalibrationError

TokenIds = npt.NDArray[np.int64]


class Bos(enum.Enum):
    """Where the BOS id comes from, if it is not given."""

    AUTO = "as the tokenizer's files say"
    NONE = "none"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A tokenizer.json, or the folder that holds one.

    Raises:
        CalibrationError: No such file, a folder without tokenizer.json, or a file that is no tokenizer.
    """
    path = tokenizer_file(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from error


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a path means.

    Raises:
        CalibrationError: There is none.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise CalibrationError(f"{path} holds no tokenizer.json: name the folder or file of the model's tokenizer")
        return path / "tokenizer.json"
    if not path.is_file():
        raise CalibrationError(f"no tokenizer at {path}: name a tokenizer.json or the folder that holds it")
    return path


def find_bos(path: str | Path) -> int | None:
    """The BOS id that a model wants in front, from the files beside its tokenizer; the first that tells decides.

    1. tokenizer_config.json: ``add_bos_token`` false says none; otherwise ``bos_token``.
    2. special_tokens_map.json: ``bos_token``.
    3. config.json, then genai_config.json: ``bos_token_id``.
    4. The post-processor of tokenizer.json: what it puts in front of an empty text.

    Args:
        path: A tokenizer.json, or the folder that holds one.

    Returns:
        The id, or None for a model without BOS.

    Raises:
        CalibrationError: A file that is not readable, or a BOS token that the tokenizer does not know.
    """
    path = tokenizer_file(path)
    tokenizer, folder = load_tokenizer(path), path.parent
    settings = read_json(folder / "tokenizer_config.json", CalibrationError)
    if settings.get("add_bos_token") is False:
        return None
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", read_json(folder / "special_tokens_map.json", CalibrationError)),
    ):
        token = content.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            token_id = tokenizer.token_to_id(token)
            if token_id is None:
                raise CalibrationError(f"{folder / name} names the BOS {token!r}, which {path} does not know: set BOS")
            return int(token_id)
    genai = read_json(folder / "genai_config.json", CalibrationError).get("model", {})
    for content in (read_json(folder / "config.json", CalibrationError), genai):
        if isinstance(content.get("bos_token_id"), int):
            return int(content["bos_token_id"])
    front = tokenizer.encode("", add_special_tokens=True).ids
    return int(front[0]) if front else None


def resolve_bos(path: str | Path, bos: int | Bos) -> int | None:
    """The BOS id to use: as given, none, or what ``find_bos`` finds.

    Raises:
        CalibrationError: As ``find_bos``.
    """
    if isinstance(bos, Bos):
        return find_bos(path) if bos is Bos.AUTO else None
    return bos


def default_text() -> str:
    """Calibration text that every Python carries: the topics of ``help()``, in the order of their names.

    English prose about a programming language with code in it, some 600 kB, from the standard library's
    ``pydoc_data.topics``. It depends on the Python version; give a text of your own for results that must not.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 (600 kB, rarely wanted)

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """Read a text file whole, as it is.

    Raises:
        CalibrationError: It is missing, not UTF-8, or empty.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: line ends are not translated
    except OSError as error:
        raise CalibrationError(f"the text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the text {path} is not UTF-8 (byte {error.start}): convert it first") from error
    if not text.strip():
        raise CalibrationError(f"the text {path} is empty: name a file with text in it")
    return text


def tokenize(text: str, tokenizer: Tokenizer) -> TokenIds:
    """The token ids of a text, ``[tokens]``, without special tokens.

    Raises:
        CalibrationError: The text is empty.
    """
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    if not ids.size:
        raise CalibrationError("the text is empty, there are no tokens in it: give some text")
    return ids


def windows(
    source: str | Sequence[int] | TokenIds,
    tokenizer: Tokenizer | None = None,
    *,
    length: int,
    count: int | None,
    bos_id: int | None = None,
    vocab_size: int | None = None,
) -> TokenIds:
    """Cut a text into windows of token ids that do not overlap.

    Args:
        source: The text, or its token ids.
        tokenizer: The tokenizer, needed for a text.
        length: Tokens of a window, BOS among them.
        count: How many windows; None for as many as the text fills.
        bos_id: Put in front of every window; None for none.
        vocab_size: The model's vocabulary; every id is checked against it.

    Returns:
        ``[count, length]``.

    Raises:
        CalibrationError: Too little text, an id outside the vocabulary, or a length that leaves no room for text.
    """
    taken = length - (bos_id is not None)
    if taken < 1 or (count is not None and count < 1):
        raise CalibrationError(f"{count} windows of {length} tokens hold no text: ask for more")
    if isinstance(source, str):
        if tokenizer is None:
            raise CalibrationError("a text needs a tokenizer: name a tokenizer.json")
        ids = tokenize(source, tokenizer)
    else:
        ids = np.asarray(source, np.int64)
    available = ids.size // taken
    wanted = available if count is None else count
    if available < max(wanted, 1):
        fewer = f"{available} window{'s' if available > 1 else ''}" if available else "shorter windows"
        needs = f"1 window of {length} needs" if wanted <= 1 else f"{wanted} windows of {length} need"
        raise CalibrationError(
            f"{needs} {max(wanted, 1) * taken} tokens of text, there are {ids.size}: ask for {fewer}, or give more text"
        )
    cut = ids[: wanted * taken].reshape(wanted, taken)
    if bos_id is not None:
        cut = np.concatenate([np.full((wanted, 1), bos_id, np.int64), cut], axis=1)
    check_vocabulary(cut, vocab_size, tokenizer)
    return cut


def check_vocabulary(ids: TokenIds, vocab_size: int | None, tokenizer: Tokenizer | None = None) -> None:
    """Check ids against the model's vocabulary.

    Raises:
        CalibrationError: An id is outside of it.
    """
    if vocab_size is None:
        return
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        size = f" (the tokenizer has {tokenizer.get_vocab_size()})" if tokenizer is not None else ""
        raise CalibrationError(
            f"token id {int(wrong[0])} is outside the model's vocabulary of {vocab_size}{size}: "
            "use the tokenizer that belongs to the model"
        )
