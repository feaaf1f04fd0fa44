"""``quantize`` up to the pipeline: what reaches it, and what is refused before."""

from collections.abc import Callable

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import QConfig, QLayerConfig


class Passed:
    """What reached the pipeline, and what was said."""

    config: QConfig
    reader: TextReader | None
    notes: str

    @property
    def layer(self) -> QLayerConfig:
        assert self.config.global_config is not None
        return self.config.global_config


Asks = Callable[..., Passed]
