"""How many positions a model has room for, as the files beside it say or its tables show."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.calibration.tables import position_table
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.companions import GENAI_CONFIG, read_json, section

_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Positions:
    """How many positions a model has room for.

    Attributes:
        count: As files beside it say or its tables show, the fewer.
        why: Who says so.
        rows: How many its tables have; later ones cannot be computed. None where no table is found.
    """

    count: int
    why: str
    rows: int | None = None

    @property
    def said(self) -> str:
        """How many there are, and who says so."""
        return f"the model has {self.count} positions ({self.why})"

    def behind(self, held: int) -> "Positions":
        """Those that are left behind a prefix of so many tokens, one at least."""
        if not held:
            return self
        rows = None if self.rows is None else max(self.rows - held, 1)
        return replace(
            self, count=max(self.count - held, 1), why=f"{self.why}, without {held} for its prefix", rows=rows
        )

    def note(self, length: int, option: str) -> tuple[str, ...]:
        """What to say of windows that are longer.

        They are no error where no table ends: RoPE goes on, and some configs state the positions before they were
        stretched.

        Args:
            length: Tokens of a window.
            option: Where shorter ones are asked for.

        Returns:
            One note, or none.

        Raises:
            CalibrationError: The tables have no rows for them.
        """
        if length <= self.count:
            return ()
        longer = f"windows of {length} tokens are longer than the {self.count} positions that the model was made for "
        longer += f"({self.why})"
        if self.rows is not None and length > self.rows:
            raise CalibrationError(f"{longer}, and it computes no later ones: use {self.count} or fewer ({option})")
        return (f"{longer}: what is measured on them may mean little; use {self.count} or fewer",)


def positions_of(folder: Path, graph: ir.Graph) -> Positions | None:
    """A model's positions, as files beside it say or its tables show, the fewer; None where neither does.

    Raises:
        CalibrationError: A config that is not readable.
    """
    stated, shown = _stated(folder), position_table(graph)
    found = [pair for pair in (stated, shown) if pair is not None]
    if not found:
        return None
    count, why = min(found, key=lambda pair: pair[0])
    return Positions(count, why, None if shown is None else shown[0])


def _stated(folder: Path) -> tuple[int, str] | None:
    """The number of positions, and where it stands.

    Raises:
        CalibrationError: A config that is not readable.
    """
    config = read_json(folder / "config.json", CalibrationError)
    for part in (config, section(config, "text_config")):  # that of models that see, too
        for key in _KEYS:
            if type(part.get(key)) is int and part[key] > 0:
                return part[key], f"{key} in config.json"
    length = section(read_json(folder / GENAI_CONFIG, CalibrationError), "model").get("context_length")
    return (length, f"context_length in {GENAI_CONFIG}") if type(length) is int and length > 0 else None


def sliding_window(folder: Path) -> int | None:
    """How many tokens a sliding window shows, as config.json states it; None without one.

    Raises:
        CalibrationError: The file is not readable.
    """
    config = read_json(folder / "config.json", CalibrationError)
    for part in (config, section(config, "text_config")):
        window, kinds = part.get("sliding_window"), part.get("layer_types")
        slides = not isinstance(kinds, list) or "sliding_attention" in kinds
        if type(window) is int and window > 0 and slides and part.get("use_sliding_window", True):
            return window
    return None
