"""Batches that a graph fixes and fewer windows than rows: the last rows are run once more, and count for nothing.

How many rows count goes with a sample under a key that is no input of any graph, from where a reader of ours is read
(:mod:`.checked`) to where samples are run (:mod:`.padding`).
"""

import numpy as np

from quarot_onnx.calibration.feeds import Feeds

ROWS = "quarot/rows"
"""The key."""


def with_rows(feeds: Feeds, rows: int | None) -> Feeds:
    """A sample of which so many rows count; None where all do."""
    return feeds if rows is None else {**feeds, ROWS: np.array(rows)}


def without_rows(feeds: Feeds) -> tuple[Feeds, int | None]:
    """What is fed of a sample, and how many of its rows count; None where all do."""
    if ROWS not in feeds:
        return feeds, None
    return {name: array for name, array in feeds.items() if name != ROWS}, int(feeds[ROWS])


def counted_rows(rows: int, batch: int | None) -> int | None:
    """How many rows of a batch that a graph fixes count, where ``rows`` are fed; None where all do."""
    return None if batch is None or rows >= batch else rows
