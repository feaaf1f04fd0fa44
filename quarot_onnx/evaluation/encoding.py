"""Texts to token ids as lm-eval's Hugging Face back end makes them, from tokenizer.json alone.

A text gets the special tokens that the tokenizer's post-processor puts around it, unless it begins with the BOS
already. What has no context is conditioned on the tokenizer's BOS, on its EOS where it has none. A BOS that is asked
for, or none, takes the place of both.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.bos import Bos, choose_bos, find_bos
from quarot_onnx.calibration.tokenizer import load_tokenizer, token_id, token_ids, tokenizer_file
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.companions import read_json

_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Encoding:
    """How texts become ids.

    Attributes:
        path: The tokenizer.json.
        tokenizer: The same, loaded.
        special: Whether its post-processor puts its own tokens around a text.
        bos: An id in front of every text in their place; None for none.
        front: What conditions a text without context; None where no file names it.
    """

    path: Path
    tokenizer: Tokenizer
    special: bool
    bos: int | None
    front: int | None

    @classmethod
    def of(cls, path: str | Path, bos: int | Bos = Bos.AUTO) -> "Encoding":
        """Read it from the files of a tokenizer.

        Args:
            path: A tokenizer.json, or the folder that holds one.
            bos: An id, or where it comes from; by default the post-processor says.

        Raises:
            CalibrationError: No tokenizer, a file that is not readable, or a BOS that is forced and that none names.
        """
        path = tokenizer_file(path)
        asked = None if bos is Bos.AUTO else choose_bos(path, bos).id
        front = asked if asked is not None else _front(path)
        return cls(path, load_tokenizer(path), bos is Bos.AUTO, asked, front)

    @property
    def prefix(self) -> int:
        """The id that conditions a text without context.

        Raises:
            CalibrationError: No file names a BOS or an EOS.
        """
        if self.front is None:
            raise CalibrationError(
                f"no file beside {self.path} names a BOS or an EOS, and a text without context needs one before it: "
                "give its id (--bos-id N; in Python bos=N)"
            )
        return self.front

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text, with what stands before it unless ``special`` is false or the text begins with it.

        Raises:
            CalibrationError: It holds what is no character.
        """
        begun = self.front is not None and text.startswith(self.tokenizer.id_to_token(self.front) or "\0")
        special &= not begun
        found = token_ids(text, self.tokenizer, "a text of a task", special=special and self.special)
        return [self.bos, *found] if special and self.bos is not None else found


def _front(path: Path) -> int | None:
    """The BOS of a tokenizer, else its EOS, else the BOS of the model's files."""
    tokenizer = load_tokenizer(path)
    for key in ("bos_token", "eos_token"):
        for name in _FILES:
            said = read_json(path.parent / name, CalibrationError).get(key)
            found = token_id(said, tokenizer)
            if found is not None:
                return found
    return find_bos(path)
