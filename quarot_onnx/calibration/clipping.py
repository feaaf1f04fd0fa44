"""How much of a range a fixed grid should cover: what lies beyond is cut off, what lies within is rounded less.

The candidates are the part of [min, max] within ±t, for t = max|x|, 2^-1/8 of it, 2^-1/4, ...: where one side alone has
an outlier, the other stays whole. Two ways to judge them, on the counts of a `LogHistogram`:

* the mean squared error: (|x| - bound)² beyond, that of rounding to multiples of s within (s² / 12 for a bin that is
  wider than s);
* the entropy, KL(P || Q) (Migacz, *8-bit Inference with TensorRT*, 2017): P are the counts, what lies beyond put into
  the outermost bins; Q those within, spread evenly over each cell of the grid.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bins = tuple[Floats, Floats, Floats]

_EVEN_BINS = 512
_FACTORS = 2.0 ** (-np.arange(96) / 8)


def _smooth(values: Floats, widths: Floats, counts: Floats) -> Bins:
    """Bins of equal width for nearly all values, where those of a logarithmic histogram hold one or two each.

    Those beyond, a thousandth of the values, keep their own.
    """
    order = np.argsort(np.abs(values))
    within = np.cumsum(counts[order]) <= 0.999 * counts.sum()
    edge = float(np.abs(values)[order][within].max(initial=0.0))
    width = max(edge / _EVEN_BINS, 1e-300)
    even = np.abs(values) <= edge
    index = np.where(even, np.floor(values / width), 0)
    index = np.where(even, index, np.sign(values) * (_EVEN_BINS + 1 + np.arange(len(values))))
    _, group = np.unique(index, return_inverse=True)
    held = np.bincount(group, counts)
    middle = np.bincount(group, counts * values) / held
    return (
        np.asarray(middle),
        np.where(np.bincount(group, even) > 0, width, np.bincount(group, widths)),
        np.asarray(held, np.float64),
    )


def candidates(low: float, high: float) -> list[tuple[float, float]]:
    """Parts of a range that holds 0, the whole first."""
    ends = _FACTORS * max(-low, high)
    return list(dict.fromkeys((max(low, -end), min(high, end)) for end in ends.tolist()))


def least_error(bins: Bins, low: float, high: float, steps: int) -> tuple[float, float]:
    """The part of [low, high] with the smallest mean squared error.

    Args:
        bins: Where they lie, how wide they are, how much they hold, [bins] each.
        low: The smallest value, or 0.
        high: The largest value, or 0.
        steps: Of the grid, from end to end.
    """
    values, widths, counts = bins

    def error(part: tuple[float, float]) -> float:
        bottom, top = part
        step = max((top - bottom) / steps, 1e-300)
        bottom = -step * np.rint(-bottom / step)  # 0 lies on the grid
        top = bottom + steps * step
        cut = np.clip(values, bottom, top)
        within = np.where(widths < step, (values - step * np.rint(values / step)) ** 2, step**2 / 12)
        return float(np.dot(counts, np.where(cut == values, within, (values - cut) ** 2)))

    return min(candidates(low, high), key=error)


def least_divergence(bins: Bins, low: float, high: float, steps: int) -> tuple[float, float]:
    """The part of [low, high] with the smallest divergence; arguments are those of `least_error`."""
    values, widths, counts = _smooth(*bins)

    narrowest = float(widths.min()) * steps

    def divergence(part: tuple[float, float]) -> float:
        bottom, top = part
        inside = (values >= bottom) & (values <= top)
        if top - bottom < narrowest or not inside.any():
            return float("inf")  # cells narrower than bins tell nothing
        first, last = np.flatnonzero(inside)[[0, -1]]
        p = counts[first : last + 1].copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[last + 1 :].sum()
        cells = np.rint((values[first : last + 1] - bottom) / max((top - bottom) / steps, 1e-300)).astype(np.int64)
        _, cell = np.unique(cells, return_inverse=True)
        mass, room = (np.bincount(cell, part[first : last + 1]) for part in (counts, widths))
        q = mass[cell] * widths[first : last + 1] / room[cell]
        p, q = p / p.sum(), q / q.sum()
        return float(np.dot(p, np.log(p / q)))

    # Of a grid as fine as the counts nothing is known: the first, the whole range.
    return min(candidates(low, high), key=divergence)
