"""What was asked for on the command line, as the pipeline takes it, and the words in which it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from quarot_onnx.cli.typed import OptionWording
from quarot_onnx.config import QConfig
from quarot_onnx.config.saying import SettingError
from quarot_onnx.errors import ConfigError
from quarot_onnx.quantization.select import Selection
from quarot_onnx.recipes.own import Calibration


@dataclass(frozen=True)
class Chosen:
    """What was asked for.

    Attributes:
        config: As the pipeline takes it.
        selection: What it quantizes of the model.
        calibration: The text, should any be needed.
        notes: What the user should know.
        calibration_notes: What the user should know where something is calibrated.
        wording: The words of whoever chose; None where a QConfig file did, whose words are Python's.
    """

    config: QConfig
    selection: Selection
    calibration: Calibration
    notes: tuple[str, ...] = ()
    calibration_notes: tuple[str, ...] = ()
    wording: OptionWording | None = None

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Put what is said of settings inside into the words of whoever chose."""
        try:
            yield
        except SettingError as error:
            if self.wording is None:
                raise
            raise ConfigError(self.wording.sentence(error.said)) from None

    def worded(self, notes: Sequence[str]) -> list[str]:
        """The same of notes of the configuration."""
        cache = self.config.kv_cache
        said = {} if cache is None or self.wording is None else {str(item): item for item in cache.said}
        return [self.wording.sentence(said[note]) if self.wording and note in said else note for note in notes]
