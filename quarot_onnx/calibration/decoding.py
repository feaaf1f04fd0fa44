"""Decode steps for ranges: tokens of a sample fed one by one, on the cache that the model itself made of those before.

A causal model makes the same of a token in a decode step and in a prefill, up to rounding. What attention reads is
another tensor then, and in some graphs other nodes run; ranges are those of both. Samples stay as they are. Behind each
of them some tokens are decoded that follow its first part, an eighth, which is run for its cache beforehand: a fraction
of the sample's own cost. The caches of all samples are kept, so that no second session has the weights in memory while
ranges are taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.checked import DataReader, wrap
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.sample import cache_after
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.sessions import runtime

DEFAULT_STEPS = 4
"""Decode steps behind every sample where nobody says how many."""

_PART = 8  # of this many parts of a sample the first one is what is decoded on


@dataclass(frozen=True, eq=False)
class Decoding:
    """Makes decode steps of samples.

    Attributes:
        inputs: Of the model, whose lengths are free.
        steps: Decode steps behind every sample; fewer where it is short.
        caches: Of every sample, the cache behind its last but one step; None where it has no step. None for all where
            the first parts are run between the samples.
    """

    inputs: ModelInputs
    steps: int
    caches: tuple[Feeds | None, ...] | None

    @classmethod
    def on(
        cls, file: str | Path, inputs: ModelInputs, steps: int, reader: DataReader, limit: int | None = None
    ) -> "Decoding":
        """Run the first part of every sample.

        Args:
            file: The model's file.
            inputs: Its inputs.
            steps: Decode steps behind every sample.
            reader: The samples: token ids ``[rows, tokens]`` without padding, on the cache that they bring.
            limit: How many of them count; None for all.

        Raises:
            CalibrationError: onnxruntime cannot run a sample.
        """
        session, caches = runtime.session(file, low_memory=True), []
        for number, feeds in enumerate(islice(wrap(reader), limit)):
            ids, held = feeds[inputs.tokens], _held(inputs, feeds)
            positions = _decoded(ids.shape[1], steps)
            whole = inputs.feed(ids[:, : positions.stop - 1], held, _length(held)) if positions else None
            caches.append(None if whole is None else cache_after(session, inputs, whole, number))
        return cls(inputs, steps, tuple(caches))

    def after(self, feeds: Feeds, number: int) -> Iterator[Feeds]:
        """The feeds of the decode steps that follow a sample, on the cache of its first part.

        Args:
            feeds: The sample.
            number: Its number.
        """
        cache = None if self.caches is None else self.caches[number]
        if cache is None:
            return
        ids, before = feeds[self.inputs.tokens], _length(_held(self.inputs, feeds))
        for position in _decoded(ids.shape[1], self.steps):
            length = before + position
            past = {name: np.ascontiguousarray(array[:, :, :length]) for name, array in cache.items()}
            yield self.inputs.feed(ids[:, position : position + 1], past, length)

    def samples(self, feeds: Feeds, number: int) -> Iterator[Sample]:
        """The same as samples; the first of them is the first part, where it is yet to be run for its cache."""
        if self.caches is not None:
            yield from (Sample(step, number) for step in self.after(feeds, number))
            return
        ids, held = feeds[self.inputs.tokens], _held(self.inputs, feeds)
        before, positions = _length(held), _decoded(ids.shape[1], self.steps)
        if positions:
            yield Sample(self.inputs.feed(ids[:, : positions.stop - 1], held, before), number, silent=True)
        for back, position in enumerate(positions, 1):
            length = before + position
            step = self.inputs.feed(ids[:, position : position + 1], held, length)
            columns = (slice(None), slice(None), slice(length))
            carried = {
                name: replace(item, columns=columns, back=back) for name, item in self.inputs.carried(step).items()
            }
            yield Sample({name: step[name] for name in step if name not in carried}, number, carried=carried)


def _decoded(tokens: int, steps: int) -> range:
    """The positions of a sample whose tokens are decoded."""
    first = max(tokens // _PART, 1)
    return range(first, min(first + steps, tokens))


def _held(inputs: ModelInputs, feeds: Feeds) -> Feeds:
    """The cache that a sample brings."""
    return {name: feeds[name] for name, role in inputs.roles.items() if role is InputRole.PAST}


def _length(cache: Feeds) -> int:
    length: int = next(iter(cache.values())).shape[2]
    return length


def decoding_on(
    file: str | Path,
    model: ir.Model,
    inputs: ModelInputs,
    steps: int,
    reader: DataReader,
    *,
    limit: int | None = None,
    memory: Memory = WHOLE,
) -> Decoding:
    """What makes decode steps.

    Args:
        file: The model's file.
        model: What was loaded of it.
        inputs: Its inputs.
        steps: Decode steps behind every sample.
        reader: The samples.
        limit: How many of them count; None for all.
        memory: Whether the model is run piece by piece; the first parts of samples then go with the samples.

    Raises:
        CalibrationError: onnxruntime cannot run a sample.
    """
    if memory.divides(model):
        return Decoding(inputs, steps, None)
    return Decoding.on(file, inputs, steps, reader, limit)


def decode_steps(
    inputs: ModelInputs | None, asked: int | None, *, calibrated: bool = True
) -> tuple[int, tuple[str, ...]]:
    """How many tokens are decoded behind every sample, and what the user should know.

    Args:
        inputs: The model's inputs; None where no range is taken.
        asked: Decode steps; None for the default where the graph allows them.
        calibrated: Whether any range is taken.
    """
    if not calibrated:
        return 0, (f"no activation has a fixed scale: {asked} decode steps not used",) if asked else ()
    if asked == 0:
        return 0, ()
    assert inputs is not None
    lengths = inputs.lengths
    if not inputs.has_cache:
        return 0, () if asked is None else (f"the graph has no cache: no decode step is calibrated on, not {asked}",)
    if lengths.seq is not None or lengths.past is not None or lengths.total is not None:
        return 0, ("the graph fixes its lengths: no decode step is calibrated on beside the windows",)
    return DEFAULT_STEPS if asked is None else asked, ()


def find_decoding(
    file: str | Path,
    folder: Path,
    reader: DataReader | None,
    asked: int | None,
    *,
    limit: int | None = None,
    calibrated: bool = True,
    memory: Memory = WHOLE,
) -> tuple[Decoding | None, tuple[str, ...]]:
    """What makes the decode steps of a model.

    Args:
        file: The model's file.
        folder: Where the original's config files lie.
        reader: The samples.
        asked: Decode steps; None for the default where the graph allows them.
        limit: How many samples count; None for all.
        calibrated: Whether any range is taken.
        memory: Whether the model is run piece by piece; the first parts of samples then go with the samples.

    Returns:
        None where there are none; and what the user should know.

    Raises:
        CalibrationError: onnxruntime cannot run a sample.
    """
    if not calibrated or asked == 0:
        return None, decode_steps(None, asked, calibrated=calibrated)[1]
    assert reader is not None, "refused before"
    model = model_io.load(file)
    inputs = ModelInputs.from_model(model, folder=folder)
    steps, notes = decode_steps(inputs, asked)
    if not steps:
        return None, notes
    return decoding_on(file, model, inputs, steps, reader, limit=limit, memory=memory), notes
