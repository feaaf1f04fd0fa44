"""4-bit weights: compare the rounding methods, then write the best.

    python examples/low_bit.py MODEL.onnx OUT.onnx [CALIBRATION.txt TEST.txt]

MODEL.onnx is a float export with its tokenizer.json beside it. Each method is tried with fake quantization (W4A4, where
they differ most), and judged by its perplexity on text that was not calibrated on; the best one writes OUT.onnx, with
4-bit weights, 8-bit activations and an 8-bit head.
"""

import sys
import tempfile
from pathlib import Path

from quarot_onnx import (
    GPTAQConfig,
    GPTQConfig,
    Int4Spec,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QronosConfig,
    QuarotConfig,
    RTNConfig,
    UInt4Spec,
    UInt8Spec,
)
from quarot_onnx.calibration.readers import TextReader, default_text
from quarot_onnx.evaluation.perplexity import perplexity

if "--help" in sys.argv or len(sys.argv) not in {3, 5}:
    print(__doc__)
    sys.exit(0 if "--help" in sys.argv else 2)
model, out, *texts = map(Path, sys.argv[1:])
study = QLayerConfig(activation=UInt4Spec(quant_granularity="Token", clip_ratio=0.9), weight=Int4Spec())
token, channel = (UInt8Spec(symmetric=True, quant_granularity=kind) for kind in ("Token", "Channel"))
deployed, head = QLayerConfig(activation=token, weight=Int4Spec()), QLayerConfig(activation=token, weight=channel)
rotation, head_name = QuarotConfig(use_random_had=True), "*lm_head*"

with tempfile.TemporaryDirectory() as folder:
    if texts:
        calibration, test = texts
    else:  # Python's own documentation, halved
        text = default_text()
        calibration, test = Path(folder, "calibration.txt"), Path(folder, "test.txt")
        calibration.write_text(text[: len(text) // 2], encoding="utf-8")
        test.write_text(text[len(text) // 2 :], encoding="utf-8")
    reader = TextReader(model, calibration)
    found = {}
    for method in (RTNConfig(), GPTQConfig(), GPTAQConfig(), QronosConfig()):
        config = QConfig(study, exclude=[head_name], algo_config=[rotation, method])
        file = Path(folder, method.name, "model.onnx")
        ModelQuantizer(config).quantize_model(model, file, reader)
        found[method] = perplexity(file, test, model.parent, windows=4).perplexity
        print(f"W4A4 {method.name}: perplexity {found[method]:.2f}")
    best = min(found, key=found.__getitem__)
    config = QConfig(deployed, specific_layer_config={head: [head_name]}, algo_config=[rotation, best])
    ModelQuantizer(config).quantize_model(model, out, reader)
    for name, file in (("float", model), (f"W4A8 {best.name}", out)):
        print(f"{name}: perplexity {perplexity(file, test, model.parent, windows=4).perplexity:.2f}")
