"""Decode steps for ranges: tokens of a sample fed one by one, on the cache that the model itself made of those before.

A causal model makes the same of a token in a decode step and in a prefill, up to rounding. What attention reads is
another tensor then, and in some graphs other nodes run; ranges are those of both. Samples stay as they are. Behind each
of them its first part, an eighth, is run for its cache, and the tokens that follow that part are decoded: a fraction of
the sample's own cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.pieces import pieces
from quarot_onnx.calibration.sample import cache_after
from quarot_onnx.io import model_io
from quarot_onnx.sessions import runtime

DEFAULT_STEPS = 4
"""Decode steps behind every sample where nobody says how many."""

_PART = 8  # of this many parts of a sample the first one is what is decoded on


@dataclass(frozen=True, eq=False)
class Decoding:
    """Makes decode steps of samples.

    Attributes:
        inputs: Of the model, whose lengths are free.
        session: Of the model, for its caches.
        steps: Decode steps behind every sample; fewer where it is short.
    """

    inputs: ModelInputs
    session: Any
    steps: int

    def after(self, feeds: Feeds, number: int) -> Iterator[Feeds]:
        """The feeds of the decode steps that follow a sample.

        Args:
            feeds: The sample: token ids ``[rows, tokens]`` without padding, on the cache that it brings.
            number: Its number, for messages.
        """
        ids = feeds[self.inputs.tokens]
        first = max(ids.shape[1] // _PART, 1)
        length = min(first + self.steps, ids.shape[1])
        past = {name: feeds[name] for name, role in self.inputs.roles.items() if role is InputRole.PAST}
        held = next(iter(past.values())).shape[2]
        for start, stop in pieces(self.inputs, length, length - first):
            step = self.inputs.feed(ids[:, start:stop], past, held + start)
            if start:
                yield step
            if stop < length:
                past = cache_after(self.session, self.inputs, step, number)


def find_decoding(
    file: str | Path, folder: Path, asked: int | None, *, calibrated: bool = True
) -> tuple[Decoding | None, tuple[str, ...]]:
    """What makes the decode steps of a model.

    Args:
        file: The model's file.
        folder: Where the original's config files lie.
        asked: Decode steps; None for the default where the graph allows them.
        calibrated: Whether any range is taken.

    Returns:
        None where there are none; and what the user should know.
    """
    if not calibrated:
        return None, (f"no activation has a fixed scale: {asked} decode steps not used",) if asked else ()
    if asked == 0:
        return None, ()
    inputs = ModelInputs.from_model(model_io.load(file), folder=folder)
    lengths = inputs.lengths
    if not inputs.has_cache:
        return None, () if asked is None else (f"the graph has no cache: no decode step is calibrated on, not {asked}",)
    if lengths.seq is not None or lengths.past is not None or lengths.total is not None:
        return None, ("the graph fixes its lengths: no decode step is calibrated on beside the windows",)
    steps = DEFAULT_STEPS if asked is None else asked
    return Decoding(inputs, runtime.session(file, low_memory=True), steps), ()
