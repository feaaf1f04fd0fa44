"""What Hessian-aware rounding needs to know of a Linear's inputs, summed up as they pass.

    H = X̃ᵀX̃ / N,    D = (X - X̃)ᵀX̃ / N,    X, X̃: [N, in]

X̃ are the inputs on the path whose earlier weights (and, where asked for, activations) are quantized, X those of the
float model. H is the Hessian of ||X̃w - X̃q||² up to a factor (GPTQ, Frantar et al. 2022, section 3); D carries the
error of everything before the Linear (GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025, where G = X̃ᵀX / N = H + Dᵀ).
D is summed of differences: taken as the difference of two sums it would drown in the rounding of their largest entries,
which the attention sink makes many orders of magnitude larger than the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.threads import one_blas_thread, panels, spread

ROWS = 2048
"""Rows of one partial product: float32 products of so many rows, summed in float64 in a fixed order.

In the first block of SmolLM2 that puts H_ij off by 1e-8 to 5e-8 of √(H_ii H_jj), where 512 rows put it off by 9e-9 to
4e-8 and cost a tenth more time (root mean square over all i, j, against sums in float64).
"""

PANEL = 384
"""Features of a panel of H and D, which one thread works on at a time."""

_BLOCK = 128
"""Rows and columns of a block that is mirrored at once: it and its image stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a Linear's inputs.

    Attributes:
        hessian: H, float64 [in, in], symmetric.
        drift: D, float64 [in, in]; None where the float path was not followed.
        tokens: N, the number of rows that were summed.
    """

    hessian: NDArray[np.float64]
    drift: NDArray[np.float64] | None
    tokens: int


@dataclass(frozen=True, eq=False)
class Products:
    """The products of some rows with themselves, one panel of H's lower half and of D after the other.

    Attributes:
        hessian: X̃ᵀX̃, for each panel of features [panel, up to its end], float32, in the order of ``panels``.
        drift: (X - X̃)ᵀX̃, for each panel of features [panel, in]; empty where it is not wanted.
    """

    hessian: tuple[NDArray[np.float32], ...]
    drift: tuple[NDArray[np.float32], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.nbytes for part in (*self.hessian, *self.drift))


Take = Callable[[NDArray[np.float32], NDArray[np.float32] | None], None]
"""Takes rows X̃ and, where D is wanted, X - X̃."""


class Portions:
    """Cuts the rows of a unit of samples into portions, one for each partial product.

    A portion has ``ROWS`` rows, the last one of a unit what is left: however the rows come, portions are the same.
    """

    def __init__(self, take: Take, *, drift: bool) -> None:
        """Start empty.

        Args:
            take: Called with each portion.
            drift: Whether D is wanted.
        """
        self._take, self._wants_drift = take, drift
        self._quantized: list[NDArray[np.float32]] = []
        self._float: list[NDArray[np.float32]] = []
        self._count = 0

    def add(self, quantized: NDArray[np.float32], float_: NDArray[np.float32] | None) -> None:
        """Add rows, which must not change afterwards."""
        start = 0
        while start < len(quantized):
            stop = min(len(quantized), start + ROWS - self._count)
            self._quantized.append(quantized[start:stop])
            if self._wants_drift:
                assert float_ is not None
                self._float.append(float_[start:stop])
            self._count += stop - start
            if self._count == ROWS:
                self.end_unit()
            start = stop

    def end_unit(self) -> None:
        """Take what waits: rows that come now are of the next unit."""
        if not self._count:
            return
        rows = np.concatenate(self._quantized)
        missing = np.concatenate(self._float) if self._wants_drift else None
        self._quantized, self._float, self._count = [], [], 0
        if missing is not None:
            missing -= rows
        self._take(rows, missing)


@dataclass(frozen=True, eq=False)
class PanelSums:
    """H's lower half and D, not divided yet, of some panels of features over all rows.

    Attributes:
        places: Which of ``panels``.
        hessian: For each [panel, up to its end], float64.
        drift: For each [panel, in]; empty where it is not wanted.
    """

    places: tuple[int, ...]
    hessian: tuple[NDArray[np.float64], ...]
    drift: tuple[NDArray[np.float64], ...]


class PanelAccumulator:
    """Sums up some panels alone, to the bits that an `Accumulator` has there."""

    def __init__(self, in_features: int, places: Sequence[int], *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Length of a row.
            places: Which of ``panels``.
            drift: Whether D is wanted.
        """
        self._places = tuple(places)
        self._panels = [panels(in_features, PANEL)[place] for place in places]
        self._hessian = [np.zeros((panel.stop - panel.start, panel.stop)) for panel in self._panels]
        self._drift = [np.zeros((panel.stop - panel.start, in_features)) for panel in self._panels if drift]

    @one_blas_thread()
    def take(self, rows: NDArray[np.float32], missing: NDArray[np.float32] | None) -> None:
        """Add a portion, see ``Take``."""
        for number, panel in enumerate(self._panels):
            lower, drift = _panel_products(panel, rows, missing)
            self._hessian[number] += lower
            if drift is not None:
                self._drift[number] += drift

    def finish(self) -> PanelSums:
        """The sums."""
        return PanelSums(self._places, tuple(self._hessian), tuple(self._drift))


@one_blas_thread()
def products(rows: NDArray[np.float32], missing: NDArray[np.float32] | None) -> Products:
    """The products of a portion.

    Args:
        rows: X̃, [rows, in].
        missing: X - X̃; None where D is not wanted.
    """
    found = [_panel_products(panel, rows, missing) for panel in panels(rows.shape[1], PANEL)]
    drift = tuple(part for _, part in found if part is not None)
    return Products(tuple(lower for lower, _ in found), drift)


def _panel_products(
    panel: slice, rows: NDArray[np.float32], missing: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Of some features H's lower half, and D."""
    own = rows[:, panel]
    lower = np.empty((own.shape[1], panel.stop), np.float32)
    lower[:, panel.start :] = own.T @ own  # NumPy sees the symmetry, and computes a half
    if panel.start:
        np.matmul(own.T, rows[:, : panel.start], out=lower[:, : panel.start])
    return lower, None if missing is None else missing[:, panel].T @ rows


class Accumulator:
    """Sums up statistics; two runs over the same units of samples in the same order give the same bits.

    However the rows of a unit are portioned, however many threads work, and wherever products are computed.
    """

    def __init__(self, in_features: int, *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Length of a row.
            drift: Whether D is wanted.
        """
        self._hessian = np.zeros((in_features, in_features))
        self._drift = np.zeros((in_features, in_features)) if drift else None
        self._tokens = 0
        self._portions = Portions(self._sum_up, drift=drift)

    def add(self, quantized: NDArray[np.float32], float_: NDArray[np.float32] | None = None) -> None:
        """Add rows, which must not change afterwards.

        Args:
            quantized: X̃, [rows, in].
            float_: X, [rows, in]; needed where D is wanted.
        """
        self._portions.add(quantized, float_)
        self._tokens += len(quantized)

    def end_unit(self) -> None:
        """A unit of samples ends here: no partial product reaches across."""
        self._portions.end_unit()

    def add_products(self, given: Sequence[Products], tokens: int) -> None:
        """Add a whole unit, its products computed already.

        Args:
            given: The products of its portions, in their order.
            tokens: Its rows.
        """
        for part in given:
            places = range(len(part.hessian))

            def add(place: int, part: Products = part) -> None:
                panel = panels(len(self._hessian), PANEL)[place]
                self._add(panel, part.hessian[place], part.drift[place] if part.drift else None)

            spread(add, places)
        self._tokens += tokens

    def add_panels(self, given: PanelSums) -> None:
        """Add whole sums of some panels; their rows are counted by ``add_products``, without products."""
        every = panels(len(self._hessian), PANEL)
        for number, place in enumerate(given.places):
            panel = every[place]
            self._hessian[panel, : panel.stop] += given.hessian[number]
            if self._drift is not None:
                self._drift[panel] += given.drift[number]

    def finish(self) -> Statistics:
        """The statistics of all rows. They take the sums' place: nothing can be added after."""
        self.end_unit()
        hessian, drift, count = self._hessian, self._drift, max(self._tokens, 1)
        for panel in panels(len(hessian), PANEL):
            hessian[panel, : panel.stop] /= count
        for start in range(0, len(hessian), _BLOCK):
            rows = slice(start, start + _BLOCK)
            for left in range(0, start, _BLOCK):
                columns = slice(left, left + _BLOCK)
                hessian[columns, rows] = hessian[rows, columns].T
        if drift is not None:
            drift /= count
        return Statistics(hessian, drift, self._tokens)

    def _sum_up(self, rows: NDArray[np.float32], missing: NDArray[np.float32] | None) -> None:
        """Add the products of a portion: of H the lower half, which is mirrored at the end."""
        spread(
            lambda panel: self._add(panel, *_panel_products(panel, rows, missing)), panels(len(self._hessian), PANEL)
        )

    def _add(self, panel: slice, lower: NDArray[np.float32], drift: NDArray[np.float32] | None) -> None:
        self._hessian[panel, : panel.stop] += lower
        if self._drift is not None and drift is not None:
            self._drift[panel] += drift
