"""Decode steps for ranges: tokens of a sample fed one by one, on the cache that the model itself made of those before.

A causal model makes the same of a token in a decode step and in a prefill, up to rounding. What attention reads is
another tensor then, and in some graphs other nodes run; ranges are those of both. Samples stay as they are. Behind each
of them some tokens are decoded that follow its first part, an eighth, on the cache that the sample's own run leaves:
what comes later changes nothing in it. Where a sample is fed in another way, or the graph has branches, which may go by
the number of tokens, the first part is run for its cache: a fraction of the sample's own cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.io.nodes import subgraphs

DEFAULT_STEPS = 4
"""Decode steps behind every sample where nobody says how many."""

_PART = 8  # of this many parts of a sample the first one is what is decoded on


@dataclass(frozen=True, eq=False)
class Decoding:
    """Makes decode steps of samples.

    Attributes:
        inputs: Of the model, whose lengths are free.
        steps: Decode steps behind every sample; fewer where it is short.
        apart: The first part of a sample is always run by itself, as the graph may compute in another way where there
            are more tokens.
    """

    inputs: ModelInputs
    steps: int
    apart: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """The outputs that later runs take over."""
        return tuple(present for _, present in self.inputs.presents)

    def samples(self, feeds: Feeds, number: int, parts: Sequence[Sample]) -> Iterator[Sample]:
        """What is run behind a sample, each with how many runs before it its cache is made.

        Args:
            feeds: The sample: token ids ``[rows, tokens]`` without padding, on the cache that it brings.
            number: Its number.
            parts: What is run of the sample itself.
        """
        ids, held = feeds[self.inputs.tokens], _held(self.inputs, feeds)
        before, positions = _length(held), _decoded(ids.shape[1], self.steps)
        if positions and not self._leaves_cache(parts, self.inputs.feed(ids, held, before)):
            yield Sample(self.inputs.feed(ids[:, : positions.stop - 1], held, before), number, silent=True)
        for back, position in enumerate(positions, 1):
            length = before + position
            step = self.inputs.feed(ids[:, position : position + 1], held, length)
            columns = (slice(None), slice(None), slice(length))
            carried = {
                name: replace(item, columns=columns, back=back) for name, item in self.inputs.carried(step).items()
            }
            yield Sample({name: step[name] for name in step if name not in carried}, number, carried=carried)

    def _leaves_cache(self, parts: Sequence[Sample], whole: Feeds) -> bool:
        """Whether what is run of a sample is the sample as it would be fed here."""
        if self.apart or len(parts) != 1 or parts[0].visible is not None or parts[0].carried:
            return False
        fed = parts[0].feeds
        return fed.keys() == whole.keys() and all(np.array_equal(fed[name], whole[name]) for name in fed)


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


def decoding_on(model: ir.Model, inputs: ModelInputs, steps: int) -> Decoding:
    """What makes decode steps.

    Args:
        model: The model.
        inputs: Its inputs.
        steps: Decode steps behind every sample.
    """
    branches = any(True for node in model.graph for _ in subgraphs(node))
    return Decoding(inputs, steps, apart=branches)


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
    model: ir.Model, folder: Path, asked: int | None, *, calibrated: bool = True
) -> tuple[Decoding | None, tuple[str, ...]]:
    """What makes the decode steps of a model.

    Args:
        model: The model.
        folder: Where the original's config files lie.
        asked: Decode steps; None for the default where the graph allows them.
        calibrated: Whether any range is taken.

    Returns:
        None where there are none; and what the user should know.
    """
    if not calibrated or asked == 0:
        return None, decode_steps(None, asked, calibrated=calibrated)[1]
    inputs = ModelInputs.from_model(model, folder=folder)
    steps, notes = decode_steps(inputs, asked)
    return (decoding_on(model, inputs, steps) if steps else None), notes
