"""A streaming histogram of constant relative resolution.

Activations of language models span many orders of magnitude: most lie around one, a few hundred times that. Bins of
equal width over the whole range would be wider than the bulk of the values, so the bins follow the float32 format: the
exponent and the leading 8 bits of the mantissa name the bin. A bin's edges are 2^-8 (0.4 %) apart, nothing has to be
known about the range beforehand, and merging is adding.
"""

import numpy as np
import numpy.typing as npt

_MANTISSA_BITS = 8
_SHIFT = 23 - _MANTISSA_BITS
_EXPONENTS = 32  # magnitudes from 2^-32 (smaller ones count as zero) to 2^32 (larger ones share the last bin)
_FIRST = (127 - _EXPONENTS) << _MANTISSA_BITS
_BINS = (2 * _EXPONENTS) << _MANTISSA_BITS  # of either sign
_CHUNK = 1 << 20  # elements worked on at a time


class LogHistogram:
    """Counts of float32 values, in 2 × 16384 bins (256 kB)."""

    def __init__(self) -> None:
        self._counts = np.zeros(2 * _BINS, np.int64)
        self._min, self._max = np.inf, -np.inf

    @property
    def empty(self) -> bool:
        """Whether no value was added."""
        return self._min > self._max

    def add(self, values: npt.NDArray[np.float32]) -> bool:
        """Count values.

        Args:
            values: Of any shape, float32.

        Returns:
            Whether all of them were finite; if not, the histogram is not to be used any more.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            low, high = float(chunk.min()), float(chunk.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                return False
            self._min, self._max = min(self._min, low), max(self._max, high)
            bits = chunk.view(np.int32)
            magnitude = np.clip(((bits & 0x7FFFFFFF) >> _SHIFT) - _FIRST, 0, _BINS - 1)
            index = np.where(bits < 0, _BINS - 1 - magnitude, _BINS + magnitude)
            self._counts += np.bincount(index, minlength=2 * _BINS)
        return True

    def merge(self, other: "LogHistogram") -> None:
        """Count what another one counted."""
        low, high, held, counts = other.__getstate__()
        self._min, self._max = min(self._min, low), max(self._max, high)
        self._counts[held] += counts

    def __getstate__(self) -> tuple[float, float, npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Most bins are empty: those that are not."""
        held = np.flatnonzero(self._counts)
        return self._min, self._max, held, self._counts[held]

    def __setstate__(self, state: tuple[float, float, npt.NDArray[np.intp], npt.NDArray[np.int64]]) -> None:
        self._min, self._max, held, counts = state
        self._counts = np.zeros(2 * _BINS, np.int64)
        self._counts[held] = counts

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self._min, self._max

    def bins(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The bins that hold anything, ascending: where they lie, how wide they are, and how much they hold."""
        index = np.flatnonzero(self._counts)
        low, high = np.array([(_edge(i, upper=False), _edge(i, upper=True)) for i in index.tolist()]).reshape(-1, 2).T
        low, high = np.maximum(low, self._min), np.minimum(high, self._max)
        return (low + high) / 2, np.maximum(high - low, 1e-30), self._counts[index].astype(np.float64)

    def central(self, percentile: float) -> tuple[float, float]:
        """The bounds that hold the central part of the values, half of the rest beyond either.

        Args:
            percentile: The part, in percent; 100 gives the minimum and maximum.

        Returns:
            Lower and upper bound, rounded outwards to a bin's edge.
        """
        assert not self.empty, "no values were added"
        cumulative = np.cumsum(self._counts)
        cut = (100.0 - percentile) / 200.0 * cumulative[-1]
        low = int(np.searchsorted(cumulative, cut, side="right"))
        high = int(np.searchsorted(cumulative, cumulative[-1] - cut, side="left"))
        return max(_edge(min(low, 2 * _BINS - 1), upper=False), self._min), min(_edge(high, upper=True), self._max)


def _edge(index: int, *, upper: bool) -> float:
    """A bin's lower or upper edge; the last bins reach to infinity, the first ones from zero."""
    negative = index < _BINS
    magnitude = _BINS - 1 - index if negative else index - _BINS
    outer = upper != negative
    if outer and magnitude == _BINS - 1:
        edge = float("inf")
    elif not outer and magnitude == 0:
        edge = 0.0
    else:
        bits = np.array((_FIRST + magnitude + outer) << _SHIFT, np.int32)
        edge = float(bits.view(np.float32))
    return -edge if negative else edge
