"""Tiny decoders, written node by node, for tests of feeding, calibration and evaluation.

``h = E[ids] + P[positions] + cumsum_t(mask * (K + V)) Wo``, ``logits = h Wh``; K and V are cached per head. The running
sum stands in for attention: it is causal, linear, and needs mask, positions and cache to be right.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import quantized_cache
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB, HIDDEN, HEADS, HEAD_DIM, POSITIONS = 32, 8, 2, 4, 128


@dataclass(frozen=True)
class Spec:
    cache: bool = True
    positions: bool = True
    ids: int = TensorProto.INT64
    dtype: int = TensorProto.FLOAT
    head_dim: int | str = HEAD_DIM
    vocab: int = VOCAB
    forget: float = 1.0  # a factor on the past: anything but one spoils decoding alone
    scales: int = 0  # axes of the scales of an integer cache; 0 for a float one


def weights(seed: int = 0, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"E": (vocab, HIDDEN), "P": (POSITIONS, HIDDEN), "Wk": (HIDDEN, HIDDEN), "Wv": (HIDDEN, HIDDEN)}
    shapes |= {"Wo": (HIDDEN, HIDDEN), "Wh": (HIDDEN, vocab)}
    return {name: rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in shapes.items()}


def build(spec: Spec | None = None, arrays: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    spec = spec or Spec()
    arrays = dict(arrays or weights(vocab=spec.vocab))
    kind = helper.tensor_dtype_to_np_dtype(spec.dtype)
    constants = {name: array.astype(kind) for name, array in arrays.items()}
    constants |= {"forget": np.array(spec.forget, kind), "axis2": np.array(2), "axes13": np.array([1, 3])}
    constants |= {"split": np.array([0, 0, HEADS, HEAD_DIM]), "join": np.array([0, 0, HIDDEN])}
    constants |= {"ends": np.array([2**62]), "time": np.array([2])} | quantized_cache.CONSTANTS
    inputs = [_info("input_ids", spec.ids, ["b", "s"]), _info("attention_mask", spec.ids, ["b", "t"])]
    outputs = [_info("logits", spec.dtype, ["b", "s", spec.vocab])]
    nodes = [helper.make_node("Gather", ["E", "input_ids"], ["x0"])]
    if spec.positions:
        inputs.append(_info("position_ids", spec.ids, ["b", "s"]))
        nodes += [
            helper.make_node("Gather", ["P", "position_ids"], ["p"]),
            helper.make_node("Add", ["x0", "p"], ["x"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["x0"], ["x"]))
    states = []
    for name, part in (("key", "k"), ("value", "v")):
        past, present = f"past_key_values.0.{name}", f"present.0.{name}"
        nodes += [
            helper.make_node("MatMul", ["x", f"W{part}"], [f"{part}0"]),
            helper.make_node("Reshape", [f"{part}0", "split"], [f"{part}1"]),
            helper.make_node("Transpose", [f"{part}1"], [f"{part}2"], perm=[0, 2, 1, 3]),
        ]
        states.append(f"{part}2")
        if spec.scales:
            more, pasts, presents = quantized_cache.quantized(f"{part}2", name, spec.scales)
            nodes, inputs, outputs = nodes + more, inputs + pasts, outputs + presents
            states[-1] = f"{name}_read"
        elif spec.cache:
            inputs.append(_info(past, spec.dtype, ["b", HEADS, "past", spec.head_dim]))
            outputs.append(_info(present, spec.dtype, ["b", HEADS, "t", spec.head_dim]))
            nodes += [
                helper.make_node("Mul", [past, "forget"], [f"{part}3"]),
                helper.make_node("Concat", [f"{part}3", f"{part}2"], [present], axis=2),
            ]
            states[-1] = present
    nodes += [
        helper.make_node("Add", states, ["kv"]),
        helper.make_node("Cast", ["attention_mask"], ["m0"], to=spec.dtype),
        helper.make_node("Unsqueeze", ["m0", "axes13"], ["m"]),
        helper.make_node("Mul", ["kv", "m"], ["masked"]),
        # CumSum has no float16 kernel.
        helper.make_node("Cast", ["masked"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("CumSum", ["wide", "axis2"], ["sums32"]),
        helper.make_node("Cast", ["sums32"], ["sums"], to=spec.dtype),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Neg", ["length"], ["first"]),
        helper.make_node("Slice", ["sums", "first", "ends", "time"], ["recent"]),
        helper.make_node("Transpose", ["recent"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "join"], ["context"]),
        helper.make_node("MatMul", ["context", "Wo"], ["o"]),
        helper.make_node("Add", ["x", "o"], ["h"]),
        helper.make_node("MatMul", ["h", "Wh"], ["logits"]),
    ]
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    if external:
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=16)
    else:
        onnx.save(model, path)
    return path


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every value renamed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names: dict[str, str] = {"": ""}

    def fresh(name: str) -> str:
        return names.setdefault(name, f"value_{len(names)}")

    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.initializer, *copy.graph.value_info):
        value.name = fresh(value.name)
    for node in copy.graph.node:
        node.input[:] = [fresh(name) for name in node.input]
        node.output[:] = [fresh(name) for name in node.output]
    return copy


def rotated(arrays: dict[str, np.ndarray], seed: int = 1) -> dict[str, np.ndarray]:
    """Keys and values rotated within each head, ``Wo`` rotated back: other caches, the same logits."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((HEAD_DIM, HEAD_DIM)))
    r = np.kron(np.eye(HEADS), q)
    out = {name: (arrays[name].astype(np.float64) @ r).astype(np.float32) for name in ("Wk", "Wv")}
    return arrays | out | {"Wo": (r.T @ arrays["Wo"].astype(np.float64)).astype(np.float32)}


def spoiled(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """One weight off by 1 %."""
    return arrays | {name: arrays[name] * np.float32(1.01)}


def tokenizer(size: int = VOCAB) -> Tokenizer:
    """Words ``w2`` … ``w<size-1>`` in a word-level tokenizer; anything else is ``<unk>``, 0; BOS is 1."""
    words = {"<unk>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, size)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def _info(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def masked(path: Path, never: float) -> Path:
    """The model, changed in place: its last two tokens never come, as graphs write it of a padded vocabulary."""
    model = onnx.load(path)
    logits = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["all_logits" if name == logits else name for name in node.output]
    shown = np.arange(VOCAB) < VOCAB - 2
    model.graph.initializer.extend(
        [numpy_helper.from_array(shown, "shown"), numpy_helper.from_array(np.float32(never), "never")]
    )
    model.graph.node.append(helper.make_node("Where", ["shown", "all_logits", "never"], [logits]))
    onnx.save(model, path)
    return path
