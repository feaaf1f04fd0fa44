"""The tokens that two decoders are compared on: random ids, and real text where a tokenizer lies beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.text import TokenIds, default_text, find_bos, load_tokenizer, windows
from quarot_onnx.errors import CalibrationError

_LOGITS = 1 << 27
"""Bytes that the logits of windows that are run at once may take."""

_CHARACTERS_PER_TOKEN = 50  # far more than any tokenizer makes of prose


@dataclass(frozen=True)
class ComparedDecoder:
    """A language model that is compared.

    Attributes:
        path: Its file.
        inputs: What it is fed.
    """

    path: Path
    inputs: ModelInputs

    @classmethod
    def read(
        cls, path: str | Path, model: ir.Model, head_dim: int | None = None, *, known: bool = True
    ) -> "ComparedDecoder":
        """Read a graph; arguments are those of ``ModelInputs.from_model``."""
        inputs = ModelInputs.from_model(model, head_dim=head_dim, folder=Path(path).parent, known=known)
        return cls(Path(path), inputs)


def token_windows(
    decoder: ComparedDecoder,
    token_ids: TokenIds | None,
    *,
    random_tokens: int,
    real_tokens: int,
    seq_len: int,
    steps: int,
    seed: int,
) -> list[TokenIds]:
    """Groups of windows ``[windows, prefill + steps]``: random ids, then real ones; those of one length together."""
    groups, vocab_size = [], decoder.inputs.vocab_size
    counted, rows = seq_len + steps if decoder.inputs.lengths.seq else seq_len, decoder.inputs.lengths.batch or 1
    if random_tokens:
        shape = (-(-random_tokens // (counted * rows)) * rows, seq_len + steps)
        groups.append(np.random.default_rng(seed).integers(0, decoder.inputs.id_range, shape))
    tokenizer_path = decoder.path.parent / "tokenizer.json"
    if token_ids is not None:
        groups.append(np.asarray(token_ids, np.int64))
        if groups[-1].ndim != 2 or groups[-1].shape[1] <= steps:
            shape = groups[-1].shape
            raise CalibrationError(f"token ids are {list(shape)}: need [windows, sequence], longer than {steps} steps")
    elif real_tokens and decoder.inputs.takes_ids and tokenizer_path.is_file() and seq_len + steps > 1:
        count = -(-real_tokens // (counted * rows)) * rows
        text = default_text()[: _CHARACTERS_PER_TOKEN * count * (seq_len + steps)]
        tokenizer, bos_id, length = load_tokenizer(tokenizer_path), _any_bos(tokenizer_path), seq_len + steps
        groups.append(windows(text, tokenizer, length=length, count=count, bos_id=bos_id, vocab_size=vocab_size))
    if not groups:
        raise CalibrationError("nothing to compare on: ask for random tokens, or give token ids")
    return [np.concatenate(groups)] if len({group.shape[1] for group in groups}) == 1 else groups


def rows_at_once(groups: Sequence[TokenIds], vocab_size: int | None) -> int:
    """How many windows are run at once, whatever memory there is: figures depend on it in their last digits."""
    if vocab_size is None:
        return 1
    row = max(group.shape[1] for group in groups) * vocab_size * 4  # float32
    return int(min(max(_LOGITS // row, 1), max(map(len, groups))))


def _any_bos(tokenizer_path: Path) -> int | None:
    """The BOS, or none where the files are at odds about it: both models see the same ids whatever it is."""
    try:
        return find_bos(tokenizer_path)
    except CalibrationError:
        return None
