"""Batches of rows of different lengths, and single runs on a cache."""

from pathlib import Path

import numpy as np

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.sessions import runtime


def left_padded(inputs: ModelInputs, rows: list[np.ndarray], past: Feeds | None = None) -> Feeds:
    """Rows of different lengths with zeros before them; on a past the last token of each."""
    longest = max(map(len, rows))
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows]).astype(np.int64)
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    if past is not None:
        ids, positions = ids[:, -1:], positions[:, -1:]
    feeds = inputs.feed(ids, past)
    for name, role in inputs.roles.items():
        if role is InputRole.MASK:
            feeds[name] = mask.astype(feeds[name].dtype)
        elif role is InputRole.POSITIONS:
            feeds[name] = positions
    return feeds


def step(session: object, inputs: ModelInputs, feeds: Feeds) -> tuple[np.ndarray, Feeds]:
    names = [inputs.logits, *(present for _, present in inputs.presents)]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))  # type: ignore[attr-defined]
    return outputs[inputs.logits], inputs.present_to_past(outputs)


def outputs(path: Path, ids: np.ndarray, pieces: tuple[int, ...] = ()) -> tuple[np.ndarray, Feeds]:
    """Logits [1, tokens, vocab] of a row, run in pieces that end there, and the last cache."""
    inputs, session = ModelInputs.from_path(path), runtime.session(path)
    logits, past, start = [], None, 0
    for stop in (*pieces, ids.shape[1]):
        found, past = step(session, inputs, inputs.feed(ids[:, start:stop], past, start))
        logits.append(found)
        start = stop
    assert past is not None
    return np.concatenate(logits, axis=1), past
