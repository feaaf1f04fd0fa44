"""Activations that are wanted whole, fetched in groups that fit a budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.observing import Observation, observing_session, run_observing
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.sample import not_finite, run_sample

_BUDGET = 512 << 20  # bytes of activations that are fetched at once


class Taker(Protocol):
    """Takes in the values of one activation."""

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in values; False where one of them is not finite."""


Counted = Callable[[Sample, NDArray[Any], str], Sequence[NDArray[Any]]]
"""The parts of an activation that count in a sample; the last argument is its name."""


def _rows(sample: Sample, values: NDArray[Any], name: str) -> Sequence[NDArray[Any]]:
    return [sample.rows(values, name)]


class Fetched:
    """Activations that are fetched group by group, each handed to a taker of its own."""

    def __init__(self, takers: Mapping[str, Taker], threads: int | None = None, *, counted: Counted = _rows) -> None:
        """Hand every activation, or what ``counted`` says counts of it, to the taker of its name."""
        self._takers, self._threads, self._counted = takers, threads, counted

    @property
    def names(self) -> Sequence[str]:
        """The activations."""
        return list(self._takers)

    def on(self, model: ir.Model, names: Sequence[str], kept: Sequence[str] = (), *, part: bool = False) -> Observation:
        """Open a model; every sample is run once for each group of activations."""
        groups = _Groups(model, names, kept, self._threads, part=part)

        def observe(sample: Sample) -> list[Any]:
            left: list[Any] = []
            for place, (group, session) in enumerate(groups.fitting(sample)):
                more = kept if place == 0 else ()
                seen, handed = run_observing(session, sample, len(group), more)
                for name, values in zip(group, seen, strict=not sample.silent):
                    if not all(map(self._takers[name].add, self._counted(sample, values, name))):
                        raise not_finite(name, sample.number)
                left += handed
            return left

        return observe


class _Groups:
    """Sessions whose outputs fit the budget; made anew when a sample is larger than those before it.

    An output that is not fetched stays alive to the end of a run all the same, so a group needs its own session. What a
    piece of a model computes is little, and is fetched at once.
    """

    def __init__(
        self, model: ir.Model, names: Sequence[str], kept: Sequence[str], threads: int | None, *, part: bool
    ) -> None:
        self._model, self._names, self._kept, self._threads = model, list(names), kept, threads
        self._sizes: dict[object, list[int]] = {}
        self._sessions: list[tuple[list[str], Any]] = []
        self._part = part
        if part:
            self._sessions = [(self._names, self._open(self._names, kept))]
        else:
            self._sizing = observing_session(model, self._names, ("Size",), threads)

    def fitting(self, sample: Sample) -> list[tuple[list[str], Any]]:
        """The groups for a sample, each with its session; what is kept comes out of the first."""
        if self._part:
            return self._sessions
        shapes = tuple((name, array.shape) for name, array in sorted(sample.feeds.items()))
        if shapes not in self._sizes:
            self._sizes[shapes] = [int(size) * 4 for size in run_sample(self._sizing, sample.feeds, sample.number)]
        sizes = dict(zip(self._names, self._sizes[shapes], strict=True))
        fits = all(len(group) == 1 or sum(map(sizes.__getitem__, group)) <= _BUDGET for group, _ in self._sessions)
        if not self._sessions or not fits:
            self._sessions = []  # the old ones go before the new ones come
            groups = _groups(sizes)
            self._sessions = [(group, self._open(group, () if i else self._kept)) for i, group in enumerate(groups)]
        return self._sessions

    def _open(self, names: Sequence[str], kept: Sequence[str]) -> Any:
        return observing_session(self._model, names, (None,), self._threads, kept)


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """Split tensors, in order, into groups of at most the budget or of one."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > _BUDGET:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
