"""The tokenizer of a model: tokenizer.json, loaded to tokenize texts whole.

A tokenizer.json may carry the truncation and padding of the training that it was saved in. Neither is obeyed: a text
is not cut, and pads are no text.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.text_files import require_characters
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.links import refuse_broken


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer, without the truncation and padding that are saved in it; once for as long as its file is.

    Args:
        path: A tokenizer.json, or the folder that holds one.

    Raises:
        CalibrationError: No such file, a folder without tokenizer.json, or a file that is no tokenizer.
    """
    path = tokenizer_file(path)
    state = path.stat()
    return _loaded(path.absolute(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)  # a run reads one for its proof, its calibration text and its check
def _loaded(path: Path, _changed: int, _size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(text: str, tokenizer: Tokenizer, name: str = "the text", *, special: bool = False) -> list[int]:
    """The token ids of a text.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        name: What the text is, for messages.
        special: With what the post-processor puts around it.

    Raises:
        CalibrationError: It holds what is no character.
    """
    require_characters(text, name)
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=special).ids]


def token_text(said: object) -> object:
    """The text of a token that a file names, where it names one: as it is, or with how it is matched."""
    return said.get("content") if isinstance(said, Mapping) else said


def token_id(said: object, tokenizer: Tokenizer) -> int | None:
    """The id of a token that a file names; None where the tokenizer does not know it, or it is no text."""
    token = token_text(said)
    try:
        found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
        return None
    return None if found is None else int(found)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a path means.

    Raises:
        CalibrationError: There is none.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            refuse_broken(path.absolute() / "tokenizer.json", CalibrationError)
            raise CalibrationError(f"{path} holds no tokenizer.json: name the folder or file of the model's tokenizer")
        return path / "tokenizer.json"
    if not path.is_file():
        refuse_broken(path.absolute(), CalibrationError)
        raise CalibrationError(f"no tokenizer at {path}: name a tokenizer.json or the folder that holds it")
    return path
