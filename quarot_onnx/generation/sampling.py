"""The next token of a text: the likeliest one, or one drawn from what is likely.

``p = softmax(logits / temperature)``, cut to the ``top_k`` likeliest tokens (Fan et al. 2018, arXiv:1805.04833), then
to the fewest likeliest ones whose probabilities sum to ``top_p`` or more (the nucleus; Holtzman et al. 2020,
arXiv:1904.09751, section 3.1), both renormalised.
"""

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from quarot_onnx.config.strict import Strict


class Sampling(Strict):
    """How a token is drawn.

    Attributes:
        temperature: What logits are divided by; below 1 the likeliest tokens gain.
        top_k: How many of the likeliest tokens are drawn from; None for all.
        top_p: The probability that those drawn from have together, at least; None for 1.
        seed: Of the generator; the same seed, model and prompt give the same text.
    """

    temperature: Annotated[float, Field(strict=True)] = 1.0
    top_k: Annotated[int, Field(ge=1, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("need a number above 0; for the likeliest token leave out temperature, top_k and top_p")
        return value


def candidates(
    logits: npt.NDArray[np.floating], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that are drawn from.

    Args:
        logits: ``[vocab]``.
        sampling: How.

    Returns:
        Their ids and their probabilities, which sum to 1; the likeliest first where any were cut off, of equal ones the
        lowest id.
    """
    below = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # of a temperature near 0: what is not the likeliest is out of reach
        scaled = below / sampling.temperature
    ids = np.arange(len(scaled))
    if sampling.top_k is not None and sampling.top_k < len(ids):
        ids = np.flatnonzero(scaled >= np.partition(scaled, -sampling.top_k)[-sampling.top_k])
        ids = ids[_descending(scaled[ids])][: sampling.top_k]
    weights = np.exp(scaled[ids])
    weights /= weights.sum()
    if sampling.top_p is not None:
        # The others make up 1 - top_p at most together, and come last: only these need be sorted. One is always left.
        likely = np.flatnonzero(weights >= min((1 - sampling.top_p) / len(weights), weights.max()))
        order = likely[_descending(weights[likely])]
        before = np.cumsum(weights[order]) - weights[order]
        order = order[before < sampling.top_p]
        ids, weights = ids[order], weights[order]
    return ids, weights / weights.sum()


def _descending(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Indices that sort values, the largest first, of equal ones the first."""
    return np.argsort(-values, kind="stable")


def next_token(logits: npt.NDArray[np.floating], sampling: Sampling | None, rng: np.random.Generator) -> int:
    """The next token.

    Args:
        logits: ``[vocab]``, finite or minus infinity.
        sampling: How it is drawn; None for the likeliest, of equal ones the lowest id.
        rng: What it is drawn with; one number of it is used up.
    """
    if sampling is None:
        return int(logits.argmax())
    ids, weights = candidates(logits, sampling)
    sums = np.cumsum(weights)
    # The sum may fall short of the number drawn by a rounding.
    return int(ids[min(int(np.searchsorted(sums, rng.random(), side="right")), len(ids) - 1)])
