"""The tokens that end a text, as the files beside a model say."""

from collections.abc import Iterator
from pathlib import Path

from quarot_onnx.calibration.tokenizer import load_tokenizer, token_id
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.companions import GENAI_CONFIG, read_json, section


def end_ids(model: Path, tokenizer: Path) -> frozenset[int]:
    """The ids that end a text: what the first file says that says anything; empty where none does.

    generation_config.json goes first, then genai_config.json and config.json, beside the model and beside the
    tokenizer, then the ``eos_token`` of tokenizer_config.json.

    Args:
        model: The model's folder.
        tokenizer: A tokenizer.json.

    Raises:
        CalibrationError: A file is not readable, or what it names is no id.
    """
    for folder in dict.fromkeys((model, tokenizer.parent)):
        for file, said in _told(folder):
            if said is not None:
                return _ids(said, file)
    file = tokenizer.parent / "tokenizer_config.json"
    token = read_json(file, CalibrationError).get("eos_token")
    known = token_id(token, load_tokenizer(tokenizer))
    return frozenset() if known is None else frozenset({known})


def _told(folder: Path) -> Iterator[tuple[Path, object]]:
    """What each file of a folder says."""
    for name, *keys in (
        ("generation_config.json",),
        (GENAI_CONFIG, "model"),
        ("config.json",),
        ("config.json", "text_config"),  # of models that see, too
    ):
        yield folder / name, section(read_json(folder / name, CalibrationError), *keys).get("eos_token_id")


def _ids(said: object, file: Path) -> frozenset[int]:
    found = said if isinstance(said, list) else [said]
    for item in found:
        if type(item) is not int or item < 0:
            raise CalibrationError(f"{file}: eos_token_id {item!r} is no token id: mend it or take it out")
    return frozenset(found)
