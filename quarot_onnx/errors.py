"""What can go wrong, as one tree of exceptions.

::

    QuarotError                    everything this package raises on purpose
    ├── InputError                 the user can mend it: exit status 2
    │   ├── ModelError             the ONNX file, its external data, its graph
    │   │   └── FeedError          an input of the graph that no rule can feed
    │   ├── ConfigError            a config file, a key in it, an option
    │   ├── CalibrationError       calibration or evaluation data, a tokenizer
    │   │   └── ShortTextError     a text with fewer tokens than are asked for
    │   ├── OutputError            the place where the result should go
    │   ├── MissingPackageError    an optional package that the task needs
    │   └── ClusterError           other machines that were to help: a scheduler, its workers, what they share
    └── VerificationError          the rewritten model is not the original: exit status 1

Every message names the offending value, its place and the way out, in one line.
Anything else that escapes (``AssertionError``, ``TypeError``) is a bug of this package.
"""

import difflib
from collections.abc import Iterable, Sequence


class QuarotError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_status = 2


class InputError(QuarotError):
    """The input, an option or the surroundings are at fault; the message says which and how to mend it."""


class ModelError(InputError):
    """The ONNX model cannot be read, or its graph cannot be treated as asked."""


class FeedError(ModelError):
    """The graph wants inputs that cannot be made from token ids.

    Attributes:
        reason: What is wanted, without the way out.
    """

    def __init__(self, reason: str, way_out: str = "feed arrays of your own") -> None:
        """Compose the message; what the way out is depends on who asked."""
        super().__init__(f"{reason}; {way_out}")
        self.reason, self._way_out = reason, way_out

    def __reduce__(self) -> tuple[type["FeedError"], tuple[str, str]]:
        """Of another process it comes as it was."""
        return type(self), (self.reason, self._way_out)


class ConfigError(InputError):
    """A configuration is wrong: an unknown key, a missing node, a wrong size, an impossible combination."""


class CalibrationError(InputError):
    """Calibration or evaluation data do not fit the model."""


class ShortTextError(CalibrationError):
    """A text holds fewer tokens than are asked for.

    Attributes:
        reason: How many, without the way out.
    """

    def __init__(self, reason: str, way_out: str) -> None:
        """Compose the message; what the way out is depends on who asked."""
        super().__init__(f"{reason}: {way_out}")
        self.reason, self._way_out = reason, way_out

    def __reduce__(self) -> tuple[type["ShortTextError"], tuple[str, str]]:
        """Of another process it comes as it was."""
        return type(self), (self.reason, self._way_out)


class OutputError(InputError):
    """The output cannot be written, or would overwrite the input."""


class MissingPackageError(InputError):
    """An optional package is not installed; the message carries the pip line."""


class ClusterError(InputError):
    """A scheduler or its workers cannot do what they are asked for; what is done so far is kept."""


class VerificationError(QuarotError):
    """The rewritten model's logits differ from the original's by more than the tolerance."""

    exit_status = 1


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A clause that names the nearest candidate, or the empty string when none is near.

    Args:
        name: The unknown name.
        candidates: The names that exist.

    Returns:
        `` (did you mean 'x'?)`` with a leading space, or ``""``.
    """
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_and_more(names: Sequence[str], shown: int = 1) -> str:
    """The first names of a list, and how many there are besides: ``a, b and 3 more``."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"
