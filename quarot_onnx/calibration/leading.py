"""What a model has before the tokens that it is fed: a sink prefix, in its graph or in a file beside it.

A text begins with tokens that such a model brings itself, a BOS above all; they are not fed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.filled import counted_rows, with_rows
from quarot_onnx.calibration.given import load_npz
from quarot_onnx.calibration.inputs import InputRole, position_axis
from quarot_onnx.calibration.padding import Padding
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.graph.metadata import prefix_of, recorded

PREFIX_FILE = "prefix.npz"
"""The file beside a model that holds its prefix as past inputs, [1, heads, tokens, head_dim] each."""


@dataclass(frozen=True, eq=False)
class Lead:
    """The prefix of a model.

    Attributes:
        ids: The tokens.
        past: Past inputs by name that the caller feeds, one row for all of a batch; None where the graph holds them.
    """

    ids: tuple[int, ...]
    past: Feeds | None = None

    @classmethod
    def of(cls, model: ir.Model, folder: Path) -> "Lead | None":
        """The prefix of a model, as its record says; None for none.

        Args:
            model: The model.
            folder: Where it lies.

        Raises:
            ModelError: The file of its prefix is missing.
        """
        found = prefix_of(recorded(model))
        if found is None:
            return None
        form, ids = found
        if form != PrefixForm.NPZ:
            return cls(ids)
        file = folder / PREFIX_FILE
        if not file.is_file():
            raise ModelError(f"{file} is missing: the model's caches start with what it holds; put it beside the model")
        return cls(ids, load_npz(file))

    def shared(self, ids: NDArray[np.int64]) -> int:
        """How many tokens a text and the prefix begin with alike: those that are not fed again.

        Args:
            ids: ``[tokens]``.
        """
        limit = min(len(self.ids), len(ids) - 1)
        return next((n for n in range(limit, 0, -1) if tuple(ids[:n].tolist()) == self.ids[:n]), 0)

    def shared_start(self, bos_id: int | None) -> int:
        """How many tokens every text begins with that are not fed again, where a BOS stands before each, or nothing."""
        return int(bos_id is not None and self.ids[:1] == (bos_id,))

    @property
    def fed_length(self) -> int:
        """Positions of the cache that the caller feeds."""
        return 0 if self.past is None else len(self.ids)


def behind(ids: Sequence[int], rows: TokenIds) -> TokenIds:
    """The same tokens before every row ``[rows, tokens]``."""
    return np.concatenate([np.tile(np.array(ids, np.int64), (len(rows), 1)), rows], axis=1)


def texts_of(model: ir.Model, samples: Sequence[Feeds]) -> list[TokenIds]:
    """The token ids ``[rows, tokens]`` of calibration samples, their padding taken off.

    Raises:
        CalibrationError: A sample holds a past, or shows no ids: what precedes its tokens is not known.
    """
    padding, inputs = Padding(model), ModelInputs.from_model(model, known=False)
    pasts = [name for name, role in inputs.roles.items() if role is InputRole.PAST]
    found: list[TokenIds] = []
    for number, feeds in enumerate(samples):
        held = any(_holds(feeds[name], fixed=bool(inputs.lengths.past)) for name in pasts if name in feeds)
        if held or inputs.tokens not in feeds or not inputs.takes_ids:
            what = "a past" if held else "no token ids"
            raise CalibrationError(
                f"calibration sample {number} holds {what}, and a sink prefix needs whole texts as token ids: "
                "calibrate on such, or leave the prefix out"
            )
        for part in padding.samples(feeds, number):
            rows = part.feeds[inputs.tokens].astype(np.int64)
            counts = np.ones(rows.shape, np.bool_) if part.visible is None else part.visible
            if (counts.all(axis=1) == counts.any(axis=1)).all():
                found.append(rows[counts.all(axis=1)])
            else:
                found += [row[seen][None] for row, seen in zip(rows, counts, strict=True) if seen.any()]
    return found


def _holds(past: NDArray[Any], *, fixed: bool) -> bool:
    """Whether a past holds anything: one of fixed length is all zeros where it does not."""
    return bool(past.any() if fixed else past.shape[position_axis(past.shape)])


def led_samples(inputs: ModelInputs, lead: Lead, texts: Sequence[TokenIds]) -> list[Feeds]:
    """Calibration samples for a model with a prefix: what of each text comes after it.

    Args:
        inputs: Of the model.
        lead: Its prefix.
        texts: From `texts_of`.
    """
    found: list[dict[str, NDArray[Any]]] = []
    for rows in texts:
        cut = min(lead.shared(row) for row in rows)
        # A past that is fed goes with one row where GroupQueryAttention reads it.
        parts = [rows[:, cut:]] if lead.past is None else [row[None, cut:] for row in rows]
        found += [
            with_rows(
                inputs.feed(part, lead.past, lead.fed_length),
                counted_rows(len(part), inputs.lengths.batch),
            )
            for part in parts
        ]
    return found
