"""Hold a quantized key/value cache with onnxruntime alone: greedy text, and the bytes of the cache.

    quarot-onnx quantize onnx/model.onnx kv8/model.onnx --kv-bits 8
    python examples/kv_cache.py kv8/model.onnx "The capital of France is"

For optimum's layout. A cache is several inputs: integers, and scales beside them. Each begins empty, in its own type
and shape, and is fed with the output of its name ever after.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
TOKENS = 24


def main(model: str, prompt: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(model).with_name("tokenizer.json")))
    inputs = {value.name: value for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    past = {
        name: np.zeros((1, value.shape[1], 0, value.shape[3]), TYPES[value.type])
        for name, value in inputs.items()
        if name.startswith("past_key_values")
    }
    new, text = tokenizer.encode(prompt).ids, []
    length = 0
    while len(text) < TOKENS:
        length += len(new)
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(new), length)[None],
        }
        feeds = {name: array for name, array in feeds.items() if name in inputs}
        outputs = dict(zip(names, session.run(names, feeds | past), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        new = [int(outputs["logits"][0, -1].argmax())]
        text += new
    held = sum(array.nbytes for array in past.values())
    print(prompt + tokenizer.decode(text))
    print(f"{held} bytes of cache for {length} positions, {held // length} for each")


if __name__ == "__main__":
    if "--help" in sys.argv or len(sys.argv) != 3:
        print(__doc__)
        sys.exit(0 if "--help" in sys.argv else 2)
    main(*sys.argv[1:])
