"""Calibrate on your own prompts, with a CalibrationDataReader of your own.

    python examples/custom_reader.py MODEL.onnx OUT.onnx

A reader is any object with get_next() -> {input name: array} | None, here a subclass of onnxruntime's. Prompts may
differ in length. Give it a rewind() where data are read more than once (percentile beside min-max).
"""

import sys
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader
from tokenizers import Tokenizer

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig, QuantGranularity, QuarotConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs

PROMPTS = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at a lower temperature in the mountains, because the air is thinner there.",
)


class PromptReader(CalibrationDataReader):
    def __init__(self, model: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(model).with_name("tokenizer.json")))
        # Knows what the graph asks for beside token ids: mask, positions, an empty cache.
        self.inputs = ModelInputs.from_path(model)
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        prompt = next(self.left, None)
        if prompt is None:
            return None
        return self.inputs.feed(np.array([self.tokenizer.encode(prompt).ids]))

    def rewind(self) -> None:
        self.left = iter(PROMPTS)


if "--help" in sys.argv or len(sys.argv) != 3:
    print(__doc__)
    sys.exit(0 if "--help" in sys.argv else 2)
model, out = sys.argv[1:3]
weight = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Channel)
config = QConfig(QLayerConfig(UInt8Spec(), weight), algo_config=[QuarotConfig()])
quantizer = ModelQuantizer(config)
quantizer.quantize_model(model, out, PromptReader(model))
print(f"calibrated on {len(PROMPTS)} prompts, wrote {quantizer.outcome.saved.path}")
