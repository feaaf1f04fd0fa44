"""A Llama-like decoder without RoPE whose keys and values are cached, and what may be done to its outputs.

``input_ids (+ past_key_values.*) -> logits (+ present.*)``. Values have short names: ``x0`` is the embedding, and in
layer 0 ``a0y`` the norm, ``q0_0`` ``k0_0`` ``v0_0`` the projections, ``v0_2`` the values by heads, ``cx0`` the context,
``o0`` what o_proj adds, ``r0`` the stream behind it, ``d0`` what down_proj adds, ``s0`` the stream behind the block.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, HEADS, HEAD_DIM, WIDE = 64, 32, 2, 16, 64
IDS = np.random.default_rng(5).integers(0, VOCAB, (1, 12))

_NUMBERS = {
    "two": np.float32(2),
    "eps": np.float32(1e-6),
    "scale": np.float32(HEAD_DIM**-0.5),
    "neg": np.float32(-1e9),
    "f0": np.float32(0),
    "split": np.array([0, 0, HEADS, HEAD_DIM]),
    "join": np.array([0, 0, HIDDEN]),
    "i0": np.int64(0),
    "i1": np.int64(1),
    "i2": np.int64(2),
    "column": np.array([-1, 1]),
    "last": np.array([-1]),
}


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def op(self, kind: str, inputs: list[str], out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"node_{out}", **attributes))
        return out

    def constant(self, name: str, value: object) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, (self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def norm(self, x: str, name: str) -> str:
        square = self.op("Pow", [x, "two"], f"{name}p")
        mean = self.op("ReduceMean", [square, "last"], f"{name}m", keepdims=1)
        root = self.op("Sqrt", [self.op("Add", [mean, "eps"], f"{name}e")], f"{name}s")
        scaled = self.op("Mul", [x, self.op("Reciprocal", [root], f"{name}r")], f"{name}x")
        gamma = self.constant(f"{name}g", (1 + 0.3 * self.rng.standard_normal(HIDDEN)).astype(np.float32))
        return self.op("Mul", [scaled, gamma], f"{name}y")

    def heads(self, source: str, name: str) -> str:
        y = self.op("MatMul", [source, self.weight(f"W{name}", HIDDEN, HIDDEN)], f"{name}_0")
        return self.op("Transpose", [self.op("Reshape", [y, "split"], f"{name}_1")], f"{name}_2", perm=[0, 2, 1, 3])

    def mask(self, keys: str, layer: int) -> str:
        """``[seq, total]``: what lies in the future."""
        total = self.op("Gather", [self.op("Shape", [keys], f"ksh{layer}"), "i2"], f"T{layer}")
        start = self.op("Sub", [total, "seq"], f"P{layer}")
        rows = self.op("Reshape", [self.op("Range", [start, total, "i1"], f"rg{layer}"), "column"], f"rows{layer}")
        later = self.op("Greater", [self.op("Range", ["i0", total, "i1"], f"cols{layer}"), rows], f"gt{layer}")
        return self.op("Where", [later, "neg", "f0"], f"mask{layer}")

    def context(self, query: str, key: str, value: str, layer: int, name: str = "") -> str:
        transposed = self.op("Transpose", [key], f"{name}kt{layer}", perm=[0, 1, 3, 2])
        scores = self.op(
            "Mul", [self.op("MatMul", [query, transposed], f"{name}sc{layer}"), "scale"], f"{name}ss{layer}"
        )
        if not name:
            scores = self.op("Add", [scores, self.mask(key, layer)], f"sm{layer}")
        weights = self.op("Softmax", [scores], f"{name}pr{layer}", axis=-1)
        joined = self.op("Transpose", [self.op("MatMul", [weights, value], f"{name}cx{layer}")], f"{name}ct{layer}",
                         perm=[0, 2, 1, 3])  # fmt: skip
        return self.op("Reshape", [joined, "join"], f"{name}ctx{layer}")

    def linear(self, x: str, name: str, out: str, rows: int, columns: int) -> str:
        return self.op("MatMul", [x, self.weight(name, rows, columns)], out)

    def cached(self, new: str, name: str, *, past: bool, present: bool) -> str:
        """What is new, joined with the past."""
        key = f"present.{name}"
        if past:
            self.inputs.append(_cache(f"past_key_values.{name}", "p"))
            new = self.op("Concat", [f"past_key_values.{name}", new], key, axis=2)
        elif present:
            new = self.op("Identity", [new], key)
        if present:
            self.outputs.append(_cache(key, "t"))
        return new

    def cross(self, x: str, layer: int, how: str) -> str:
        """What attention to the encoder adds."""
        query = self.heads(self.norm(x, f"c{layer}"), f"cq{layer}")
        names = [f"past_cross.{layer}.{part}" for part in ("key", "value")]
        if how == "made":
            names = [self.heads("encoder", f"c{part}{layer}") for part in "kv"]
            self.outputs += [_cache(made, "e") for made in names]
        else:
            self.rng.standard_normal((2, HIDDEN, HIDDEN))  # equal weights in both halves
            self.inputs += [_cache(given, "e") for given in names]
        return self.linear(self.context(query, *names, layer, "c"), f"Wco{layer}", f"co{layer}", HIDDEN, HIDDEN)

    def mlp(self, x: str, layer: int) -> str:
        h = self.norm(x, f"b{layer}")
        gate = self.linear(h, f"Wg{layer}", f"g{layer}", HIDDEN, WIDE)
        active = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"sg{layer}")], f"si{layer}")
        wide = self.op("Mul", [active, self.linear(h, f"Wu{layer}", f"u{layer}", HIDDEN, WIDE)], f"mm{layer}")
        return self.linear(wide, f"Wd{layer}", f"d{layer}", WIDE, HIDDEN)


def build(
    layers: int = 2, *, past: bool = True, present: bool = True, cross: str = "", seed: int = 0
) -> onnx.ModelProto:
    """The model; equal seeds give equal weights.

    Args:
        layers: Decoder blocks.
        past: Caches come in.
        present: Caches leave; without a past through an Identity, as a prefill graph does.
        cross: ``made``: every block attends to ``encoder`` too, whose K and V leave; ``given``: they come in.
        seed: Of the weights.
    """
    out = _Writer(seed)
    for name, value in _NUMBERS.items():
        out.constant(name, value)
    out.inputs.append(_info("input_ids", TensorProto.INT64, ["b", "s"]))
    out.outputs.append(_info("logits", TensorProto.FLOAT, ["b", "s", VOCAB]))
    if cross == "made":
        out.inputs.append(_info("encoder", TensorProto.FLOAT, ["b", "e", HIDDEN]))
    table = out.constant("table", out.rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32))
    x = out.op("Gather", [table, "input_ids"], "x0")
    out.op("Gather", [out.op("Shape", ["input_ids"], "ids_shape"), "i1"], "seq")
    for layer in range(layers):
        h = out.norm(x, f"a{layer}")
        query, key, value = (out.heads(h, f"{part}{layer}") for part in "qkv")
        key = out.cached(key, f"{layer}.key", past=past, present=present)
        value = out.cached(value, f"{layer}.value", past=past, present=present)
        context = out.context(query, key, value, layer)
        x = out.op("Add", [x, out.linear(context, f"Wo{layer}", f"o{layer}", HIDDEN, HIDDEN)], f"r{layer}")
        if cross:
            x = out.op("Add", [x, out.cross(x, layer, cross)], f"cr{layer}")
        x = out.op("Add", [x, out.mlp(x, layer)], f"s{layer}")
    out.linear(out.norm(x, "f"), "Wh", "logits", HIDDEN, VOCAB)
    constants = [numpy_helper.from_array(value, name) for name, value in out.constants.items()]
    graph = helper.make_graph(out.nodes, "cached", out.inputs, out.outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _info(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _cache(name: str, length: str) -> onnx.ValueInfoProto:
    return _info(name, TensorProto.FLOAT, ["b", HEADS, length, HEAD_DIM])


def put_out(model: onnx.ModelProto, value: str, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT) -> str:
    """Make ``value``, or what the last of ``nodes`` makes of it, an output of the graph; its name."""
    model.graph.node.extend(nodes)
    name = nodes[-1].output[0] if nodes else value
    model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return name


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / name)
    return folder / name


def run(path: Path, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    """All outputs by name; caches that are not given are empty."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    empty = np.zeros((1, HEADS, 0, HEAD_DIM), np.float32)
    feeds = {i.name: empty for i in session.get_inputs() if i.name.startswith("past")} | feeds
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def difference(a: NDArray, b: NDArray) -> float:
    """``|b - a| / |a|``."""
    return float(np.linalg.norm(b.astype(np.float64) - a) / np.linalg.norm(a.astype(np.float64)))
