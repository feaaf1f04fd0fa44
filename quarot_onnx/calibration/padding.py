"""Padding taken off calibration samples, so that what a mask hides has no part in any statistic.

A batch of texts of different lengths is filled up with pads, and the attention mask [batch, sequence] says which
positions are text. Each row of such a sample becomes a sample of its own with its visible positions alone: batch 1,
tokens, positions and mask cut along the sequence, a cache along its positions. What never runs cannot be measured,
whatever shape activations have inside the graph; and graphs that read a mask as a mere length (GroupQueryAttention)
are fed what they mean, whichever side the pads were on.

Where the graph fixes its batch or sequence, or has no position ids and the hidden positions lie between visible ones, a
sample runs as it is, and the rows that count are chosen from its activations: they are those of
[batch, sequence, ...] or [batch · sequence, ...]. Any other shape is refused. So are the rows chosen that count where
others fill up a batch that the graph fixes (:mod:`.filled`).
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.filled import without_rows
from quarot_onnx.calibration.inputs import InputRole, position_axis
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.piecewise.sweep import Carried

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """What is run at once.

    Attributes:
        feeds: Input name to array.
        number: The reader's sample that it comes from, for messages.
        visible: ``[batch, sequence]``, the positions that count; None where all do.
        held: ``[batch, past + sequence]``, the positions of a cache that count; None where all do.
        carried: Inputs that come from earlier samples, where samples are run one after the other.
        silent: It is run for what others take over from it, and not looked at.
    """

    feeds: Feeds
    number: int
    visible: Mask | None = None
    held: Mask | None = None
    carried: Mapping[str, Carried] = field(default_factory=dict)
    silent: bool = False

    def rows(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        """The part of an activation that counts, as rows ``[rows, last axis]`` where anything is left out.

        Args:
            array: The activation, with its token axes first.
            name: Its name, for messages.

        Raises:
            CalibrationError: Its axes are not those of the tokens.
        """
        if self.visible is None:
            return array
        flat, shape = self.visible.reshape(-1), array.shape
        if array.ndim < 2 or (shape[:2] != self.visible.shape and shape[0] != flat.size):
            raise CalibrationError(
                f"sample {self.number} hides positions, and the axes of the activation {name!r} {list(shape)} are not "
                f"those of its tokens {list(self.visible.shape)}: which of its rows are padding is not known; feed one "
                "text at a time without padding, or whole batches where the graph fixes one"
            )
        matrix = array.reshape(-1, shape[-1])
        return matrix[np.repeat(flat, len(matrix) // flat.size)]

    def cached(self, array: NDArray[Any], name: str) -> list[NDArray[Any]]:
        """What counts of a cache: whole rows together, or ``[1, heads, positions, last axis]`` each where some are cut.

        Args:
            array: The cache that the run puts out, ``[batch, heads, positions, last axis]``.
            name: Its name, for messages.

        Raises:
            CalibrationError: It does not hold one position for each column of the mask.
        """
        return self._of_heads(array, self.held, f"the cache {name!r}")

    def heads(self, array: NDArray[Any], name: str) -> list[NDArray[Any]]:
        """What counts of queries, keys or values; arguments, result and errors are those of `cached`."""
        return self._of_heads(array, self.visible, repr(name))

    def _of_heads(self, array: NDArray[Any], counts: Mask | None, what: str) -> list[NDArray[Any]]:
        if counts is None:
            return [array]
        if (array.shape[0], array.shape[2]) != counts.shape:
            raise CalibrationError(
                f"sample {self.number} hides positions, and {what} {list(array.shape)} holds others than its mask "
                f"{list(counts.shape)}: feed one text at a time without padding, or whole batches where the graph "
                "fixes one"
            )
        whole, some = counts.all(axis=1), counts.any(axis=1)
        if (whole == some).all():
            return [array[whole]]
        return [array[row : row + 1, :, counts[row]] for row in np.flatnonzero(some).tolist()]


class Padding:
    """Takes the padding off samples of one model."""

    def __init__(self, model: ir.Model) -> None:
        """Find out which input is the mask.

        Args:
            model: The whole model; of one that is no decoder the mask goes by its name.
        """
        self._fixed = {value.name: _fixed_lengths(value) for value in model.graph.inputs}
        self._roles: Mapping[str, InputRole] = {}
        self._in_place = False
        with suppress(ModelError):
            inputs = ModelInputs.from_model(model)
            self._roles, self._in_place = inputs.roles, inputs.lengths.in_place

    def samples(self, feeds: Feeds, number: int) -> Iterator[Sample]:
        """What to run of one sample of a reader; nothing of rows that are hidden as a whole, or fill up a batch.

        Args:
            feeds: Input name to array.
            number: The sample's number.

        Raises:
            CalibrationError: The mask hides positions of inputs whose axes are not known.
        """
        feeds, rows = without_rows(feeds)
        parts = self._parts(feeds, number)
        yield from parts if rows is None else (self._without_filling(part, rows) for part in parts)

    def _parts(self, feeds: Feeds, number: int) -> Iterator[Sample]:
        """The same of a sample whose rows all count."""
        name = self._mask(feeds)
        shown = None if name is None else _shown(feeds[name])
        if name is None or shown is None or shown.all():
            yield Sample(feeds, number)
            return
        past, fed = self._past_length(feeds), self._fed(feeds)
        if fed is not None and shown.shape[1] != past + fed[1]:
            # The columns of a cache that is written in place: what the mask hides there is no token of this sample.
            yield Sample(feeds, number)
            return
        layout = _Layout(feeds, shown, past)
        odd = next((name for name in feeds if layout.axes(name) is None), None)
        if odd is not None:
            raise CalibrationError(
                f"sample {number} hides positions ({name!r} {list(shown.shape)}), and which axes of the input {odd!r} "
                f"{list(feeds[odd].shape)} are batch and sequence is not known: feed one text at a time without padding"
            )
        current = shown[:, layout.past :]
        parts = [layout.cut(row) for row in np.flatnonzero(current.any(axis=1)).tolist()]
        positions = InputRole.POSITIONS in self._roles.values()
        if all(self._fits(part) for part in parts) and (positions or not _has_gaps(shown)):
            yield from (Sample(part, number) for part in parts)
        elif parts:
            yield Sample(feeds, number, current, shown)

    def _without_filling(self, sample: Sample, rows: int) -> Sample:
        """A sample of a fixed batch of which so many rows count."""
        fed, past = self._fed(sample.feeds), self._past_length(sample.feeds)
        assert fed is not None, "whoever filled it up knew what it feeds"
        batch, tokens = fed
        counts = np.arange(batch)[:, None] < rows
        visible, held = (
            counts & (np.ones((1, columns), np.bool_) if seen is None else seen)
            for seen, columns in ((sample.visible, tokens), (sample.held, past if self._in_place else past + tokens))
        )
        return replace(sample, visible=visible, held=held)

    def tokens(self, feeds: Feeds, number: int) -> NDArray[Any] | None:
        """The visible token ids of a sample, in one row; None where the token input is not known, or not fed."""
        name = next((name for name, role in self._roles.items() if role is InputRole.TOKENS), None)
        if name is None or name not in feeds:
            return None
        chosen = [np.zeros(0, feeds[name].dtype)]
        for part in self.samples(feeds, number):
            ids = part.feeds[name]
            chosen.append(ids.reshape(-1) if part.visible is None else ids[part.visible])
        return np.concatenate(chosen)

    def rows(self, sample: Sample) -> int:
        """About how many rows the activations of a sample have: its visible tokens, as far as they are known."""
        if sample.visible is not None:
            return int(sample.visible.sum())
        main = (InputRole.TOKENS, InputRole.EMBEDDINGS)
        known = [array for name, array in sample.feeds.items() if self._roles.get(name) in main]
        arrays = known or [array for array in sample.feeds.values() if array.ndim < 4]
        return max((int(np.prod(array.shape[:2])) for array in arrays), default=1)

    def _mask(self, feeds: Feeds) -> str | None:
        """The mask's name; None where there is none, or one of other axes."""
        masks = [name for name, role in self._roles.items() if role is InputRole.MASK]
        if not self._roles:
            masks = [name for name in feeds if "mask" in name]
        return next((name for name in masks if name in feeds and feeds[name].ndim == 2), None)

    def _fed(self, feeds: Feeds) -> tuple[int, int] | None:
        """Rows and tokens that are fed; None where that is not known."""
        main = (InputRole.TOKENS, InputRole.EMBEDDINGS)
        name = next((name for name, role in self._roles.items() if role in main and name in feeds), None)
        return None if name is None else (feeds[name].shape[0], feeds[name].shape[1])

    def _past_length(self, feeds: Feeds) -> int:
        """The positions in the cache that is fed."""
        pasts = [name for name, role in self._roles.items() if role is InputRole.PAST and name in feeds]
        shape = feeds[pasts[0]].shape if pasts else ()
        return shape[position_axis(shape)] if shape else 0

    def _fits(self, feeds: Feeds) -> bool:
        """Whether the graph's fixed lengths allow these shapes."""
        return all(
            want in {None, have}
            for name, array in feeds.items()
            for have, want in zip(array.shape, self._fixed.get(name, ()), strict=False)
        )


@dataclass(frozen=True, eq=False)
class _Layout:
    """The axes of a sample's inputs.

    Attributes:
        feeds: Input name to array.
        shown: ``[batch, past + sequence]``, what the mask shows.
        past: Positions in the cache.
    """

    feeds: Feeds
    shown: Mask
    past: int

    def axes(self, name: str) -> tuple[int, Mask] | None:
        """An input's axis of positions, and what is visible on it; None where the axes are not known.

        The axis is -1 for a number that serves all rows.
        """
        array, (batch, total) = self.feeds[name], self.shown.shape
        if array.ndim < 2:
            return (-1, self.shown) if array.size == 1 else None
        if array.ndim == 4 and (array.shape[0], array.shape[2]) == (batch, self.past):
            return 2, self.shown[:, : self.past]
        if array.shape == self.shown.shape:
            return 1, self.shown
        # Positions may serve the whole batch.
        if array.shape[0] in {1, batch} and array.shape[1] == total - self.past:
            return 1, self.shown[:, self.past :]
        return None

    def cut(self, row: int) -> Feeds:
        """One row of the sample, with what is visible of it."""
        found: Feeds = {}
        for name, array in self.feeds.items():
            axes = self.axes(name)
            assert axes is not None
            axis, visible = axes
            if axis == -1:
                found[name] = array
                continue
            own = array if len(array) == 1 else array[row : row + 1]
            found[name] = np.ascontiguousarray(np.compress(visible[row], own, axis=axis))
        return found


def _shown(mask: NDArray[Any]) -> Mask:
    """Which positions a mask shows: where it is not zero, or, for one that is added to scores, where it is."""
    if np.issubdtype(mask.dtype, np.floating) and (mask <= 0).all():
        return np.asarray(mask == 0)
    return np.asarray(mask != 0)


def _has_gaps(shown: Mask) -> bool:
    """Whether hidden positions lie between visible ones."""
    edges = np.diff(shown.astype(np.int8), axis=1, prepend=0)
    return bool(((edges == 1).sum(axis=1) > 1).any())


def _fixed_lengths(value: ir.Value) -> tuple[int | None, ...]:
    """The lengths of an input's axes that the graph fixes."""
    return () if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
