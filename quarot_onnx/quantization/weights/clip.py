"""How far to shrink the range of a weight before rounding it.

A narrower range rounds most weights finer and cuts off a few. Of the shrink factors

    p = 1 - i / steps,    i = 0, 1, …, int(max_shrink · steps) - 1

each group keeps the one with the smallest Σ|w - s·p·(q - z)|^norm over its weights, the first of equals (the
convention of the code of GPTQ, Frantar et al. 2022, and QuaRot, Ashkboos et al. 2024: 80 factors, norm 2.4). Both
ends of the range shrink alike, so that the zero point is that of p = 1.

All factors are tried; the search is made fast by staying inside the processor's cache and in float32. It sums 128
errors at a time, which is off by 1e-5 of the sum at most: two factors whose errors are nearer may be taken for each
other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TILE = 32768
"""Weights looked at together: with two buffers, 384 kB of float32, which a core's own cache holds."""
_TILE_ROWS = 128


@dataclass(frozen=True)
class ClipSearch:
    """Which shrink factors are tried.

    Attributes:
        enabled: Whether to search; else the range is the weights' own.
        steps: 1 / the distance of two factors.
        max_shrink: The part of the range that may be cut off, in [0, 1].
        norm: The exponent of an error.
    """

    enabled: bool = True
    steps: int = 100
    max_shrink: float = 0.8
    norm: float = 2.4

    def __post_init__(self) -> None:
        """Check our own callers; users' values are checked by the configuration."""
        assert self.steps >= 1, self.steps
        assert 0.0 <= self.max_shrink <= 1.0, self.max_shrink
        assert self.norm > 0.0, self.norm

    @property
    def factors(self) -> NDArray[np.float64]:
        """All p in falling order, 1 first; [1.0] where the search is off."""
        count = int(self.max_shrink * self.steps) if self.enabled else 1
        return 1.0 - np.arange(max(count, 1)) / self.steps


def shrink_errors(
    weight: NDArray[np.floating],
    scale: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    clip: ClipSearch,
) -> NDArray[np.float64]:
    """What each shrink factor costs each column.

    Args:
        weight: Rows of W: [rows, out].
        scale: The steps at p = 1, [out].
        low: The smallest q - z, [out].
        high: The largest q - z, [out].
        clip: The search.

    Returns:
        Σ over the rows of |w - s·p·(q - z)|^norm in units of s^norm, [factors, out].
    """
    rows, out = weight.shape
    factors = clip.factors
    errors = np.zeros((len(factors), out))
    height = min(rows, _TILE_ROWS)
    width = max(1, _TILE // height)
    for left in range(0, out, width):
        columns = slice(left, left + width)
        limits = low[columns].astype(np.float32), high[columns].astype(np.float32)
        for top in range(0, rows, height):
            tile = (weight[top : top + height, columns] / scale[columns]).astype(np.float32)
            _add_errors(errors[:, columns], tile, limits, factors, np.float32(clip.norm / 2))
    return errors * (factors**clip.norm)[:, None]


def _add_errors(
    errors: NDArray[np.float64],
    tile: NDArray[np.float32],
    limits: tuple[NDArray[np.float32], NDArray[np.float32]],
    factors: NDArray[np.float64],
    half_norm: np.float32,
) -> None:
    """Add the errors of one tile, in units of (s·p)^norm; |e|^norm is exp(norm/2 · log e²), far faster than a power."""
    low, high = limits
    exact, error = np.empty_like(tile), np.empty_like(tile)
    for number, factor in enumerate(factors):
        np.multiply(tile, np.float32(1.0 / factor), out=exact)
        np.rint(exact, out=error)
        np.maximum(error, low, out=error)
        np.minimum(error, high, out=error)
        np.subtract(error, exact, out=error)
        np.multiply(error, error, out=error)
        with np.errstate(divide="ignore"):  # log 0 = -inf, and exp -inf = 0 again
            np.log(error, out=error)
        np.multiply(error, half_norm, out=error)
        np.exp(error, out=error)
        errors[number] += error.sum(axis=0)
