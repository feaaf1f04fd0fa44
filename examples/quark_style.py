"""AMD Quark's documented QuaRot script with its imports changed: quark.onnx -> quarot_onnx.

    python examples/quark_style.py MODEL.onnx OUT.onnx [rotation_config.json]

MODEL.onnx is a float export with its tokenizer.json beside it. What the snippet leaves to Quark is written out here:
the calibration data. What Quark needs and this package does not, r_matrix_dim and r_config_path, may stay or go.
"""

import sys

from quarot_onnx import Int8Spec, ModelQuantizer, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.calibration.readers import TextReader

if "--help" in sys.argv or len(sys.argv) not in {3, 4}:
    print(__doc__)
    sys.exit(0 if "--help" in sys.argv else 2)
input_model_path, output_model_path = sys.argv[1:3]
r_config_path = sys.argv[3] if len(sys.argv) > 3 else None

# Any onnxruntime CalibrationDataReader will do; this one reads the text that comes with Python.
data_reader = TextReader(input_model_path, samples=8, seq_len=128)

quant_config = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec())

quarot_config = QuarotConfig(
    use_random_had=False,
    r_config_path=r_config_path,
)

config = QConfig(
    global_config=quant_config,
    algo_config=[quarot_config],
    OpTypesToQuantize=["MatMul", "Gemm"],
)

quantizer = ModelQuantizer(config)
quantizer.quantize_model(input_model_path, output_model_path, data_reader)

proof = quantizer.outcome.equivalence
print(f"rotation proved over {proof.tokens} tokens: max |Δlogit| {proof.max_abs_logit_diff:.1e}")
print(f"wrote {output_model_path}")
