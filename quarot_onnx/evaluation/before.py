"""What is fed to a model before the tokens that are compared: the prefix that another one holds by itself."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from quarot_onnx.calibration.leading import Lead, behind
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import ModelError


@dataclass(frozen=True, eq=False)
class Before:
    """A prefix that is fed: as tokens at the start of every window, or as the cache that a model starts from.

    Attributes:
        ids: The tokens, to a model that has none of its own; empty for a cache.
        past: The cache.
    """

    ids: tuple[int, ...] = ()
    past: Lead | None = None

    @property
    def length(self) -> int:
        """Positions that the caches hold of it."""
        return len(self.ids) or (0 if self.past is None else self.past.fed_length)

    def windows(self, windows: TokenIds) -> TokenIds:
        """The windows as they are fed."""
        return behind(self.ids, windows)

    def without(self, name: str, output: npt.NDArray[Any], caches: Collection[str], *, fed: int) -> npt.NDArray[Any]:
        """An output without what belongs to the prefix.

        Args:
            name: Its name.
            output: ``[rows, tokens, ...]``, or something that is not of every token.
            caches: The names of caches.
            fed: The tokens of the run, where it is the one that the prefix was fed in, else 0.
        """
        if name in caches:
            return output[:, :, self.length :]
        return output[:, len(self.ids) :] if fed and output.ndim > 1 and output.shape[1] == fed else output


def befores(first: Lead | None, second: Lead | None) -> tuple[Before, Before]:
    """What two models are fed so that both stand behind the same prefix.

    Args:
        first: What the first has of its own.
        second: What the second has.

    Raises:
        ModelError: They have different ones.
    """
    ids = {lead.ids for lead in (first, second) if lead is not None}
    if len(ids) > 1:
        raise ModelError(
            f"the models hold different prefixes, {' and '.join(map(str, sorted(ids)))}: nothing to compare"
        )
    own = ids.pop() if ids else ()
    fed = [Before(own) if lead is None else Before(past=lead) for lead in (first, second)]
    return fed[0], fed[1]
