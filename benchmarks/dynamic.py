"""What onnxruntime's own dynamic quantization makes of a model, to be measured beside ours.

    python benchmarks/dynamic.py MODEL.onnx OUT.onnx [--int8]

`quantize_dynamic` with uint8 weights, one scale per tensor, all MatMuls and the head; `--int8` for int8 weights.
Companion files are copied along, so that `quarot-onnx evaluate OUT.onnx` finds the tokenizer.
"""

import argparse
import shutil
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from quarot_onnx.io.companions import companion_files


def main() -> None:
    parser = argparse.ArgumentParser(description="onnxruntime's quantize_dynamic, for comparison.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--int8", action="store_true", help="int8 weights, which saturate without VNNI")
    arguments = parser.parse_args()
    if arguments.out.absolute().parent == arguments.model.absolute().parent:
        parser.error("the output goes to another folder than the model's, as the model's other files are copied there")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    kind = QuantType.QInt8 if arguments.int8 else QuantType.QUInt8
    quantize_dynamic(
        arguments.model, arguments.out, op_types_to_quantize=["MatMul"], weight_type=kind, use_external_data_format=True
    )
    for file in companion_files(arguments.model.parent, exclude=()):
        shutil.copy(file, arguments.out.with_name(file.name))


if __name__ == "__main__":
    main()
