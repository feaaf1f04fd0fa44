#!/bin/sh
# From a float export to an int8 model in five commands:
#
#     sh examples/cli_walk.sh MODEL.onnx OUT_DIR [TEXT]
#
# MODEL.onnx has its tokenizer.json beside it. TEXT is what perplexity is taken on; without it, part of the reference
# manual that comes with Python. WINDOWS (default 8) and SEQ_LEN (default 512) say how much of it.
set -eu

model=$1
out=$2
text=${3:-$out/text.txt}
windows=${WINDOWS:-8}
seq_len=${SEQ_LEN:-512}

mkdir -p "$out"
if [ $# -lt 3 ]; then
    python -c 'import sys; from pydoc_data.topics import topics; sys.stdout.write("\n".join(topics.values()))' > "$text"
fi

echo "== 1. What is this model, and where can rotations go?"
quarot-onnx inspect "$model" --write-config "$out/rotation_config.json"

echo "== 2. Rotate. The result is a float model that computes the same; the command proves it."
quarot-onnx rotate "$model" "$out/rotated/model.onnx" --rotation-config "$out/rotation_config.json" --no-r3

echo "== 3. Prove it once more, on other tokens."
quarot-onnx verify "$model" "$out/rotated/model.onnx" --seed 1

echo "== 4. Quantize the rotated model: 8-bit weights, 8-bit activations per token."
quarot-onnx quantize "$out/rotated/model.onnx" "$out/int8/model.onnx"

echo "== 5. What did that cost?"
for name in "$model" "$out/int8/model.onnx"; do
    quarot-onnx evaluate "$name" --text "$text" --windows "$windows" --seq-len "$seq_len"
done
