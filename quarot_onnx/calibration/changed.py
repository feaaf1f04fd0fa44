"""A calibration reader whose samples are changed on their way."""

from collections.abc import Callable

from quarot_onnx.calibration.bos import BosChoice
from quarot_onnx.calibration.checked import CheckedReader
from quarot_onnx.calibration.feeds import Feeds


class ChangedReader(CheckedReader):
    """The samples of another reader, each changed; messages and notes are that reader's."""

    def __init__(self, reader: CheckedReader, change: Callable[[Feeds], Feeds]) -> None:
        """Read from ``reader``, which counts what it gives."""
        super().__init__(reader)
        self.name, self.size = reader.name, reader.size
        self._of, self._change = reader, change

    @property
    def bos(self) -> BosChoice | None:
        """What stood in front of every window of text; None where no text was read."""
        return self._of.bos

    def notes(self, wanted: int | None) -> tuple[str, ...]:
        """What the user should know of what was read; ``wanted`` as for `CheckedReader`."""
        return self._of.notes(wanted)

    def require_sample(self) -> None:
        """Refuse a reader that has nothing to give; the other one keeps what it reads to find out.

        Raises:
            CalibrationError: It is empty, or what it gives is no sample.
        """
        self._of.require_sample()

    def get_next(self) -> Feeds | None:
        """The next feed, changed, or None at the end.

        Raises:
            CalibrationError: Something else came, or it cannot be changed.
        """
        feeds = super().get_next()
        return None if feeds is None else self._change(feeds)
