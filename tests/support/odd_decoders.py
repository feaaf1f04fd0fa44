"""A Llama-like decoder without RoPE whose inputs are anything that exporters make of them, written node by node.

``input_ids (+ mask, past) -> logits (+ present)``. The causal mask is made from lengths, or comes from outside.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, HEADS, HEAD_DIM, WIDE = 64, 32, 2, 16, 64
FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL

Dim = int | str


@dataclass(frozen=True)
class Spec:
    """What is out of the ordinary.

    Attributes:
        batch: The declared batch.
        seq: The declared length of the new tokens.
        past: The declared length of the cache; 0 for a graph without one.
        ids: How ids reach the table: ``plain``, ``clip``, ``where``, ``max min``, ``offset``, or ``embedded`` (the
            graph takes embeddings in their place).
        mask: The input that hides positions: ``""``, ``ones`` [batch, total], ``bias`` [batch, 1, seq, total],
            ``bias 3d``, ``bias heads``, ``bool`` (4-D) or ``bool 2d``.
        total: The declared columns of the mask.
        number: A scalar input: ``keep`` (logits to keep), ``past`` (where the causal mask begins) or ``""``.
        number_shape: Its shape.
        unread: An integer input [batch, seq] that nothing reads.
        unknown: An input that no rule knows: a float [1] that scales the logits.
        names: Prefix of the names of inputs; without one they are the exporters' names.
    """

    batch: Dim = "batch"
    seq: Dim = "seq"
    past: Dim = "past"
    ids: str = "plain"
    mask: str = ""
    total: Dim = "total"
    number: str = ""
    number_shape: tuple[int, ...] = ()
    unread: bool = False
    unknown: bool = False
    names: str = ""


@dataclass
class _Writer:
    spec: Spec
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def op(self, op: str, *inputs: str, out: str = "", **attributes: object) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def matrix(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

    def input(self, name: str, dtype: int, shape: list[Dim]) -> str:
        name = f"{self.spec.names}{len(self.inputs)}" if self.spec.names else name
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def norm(self, x: str) -> str:
        square = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", square, self.constant(1e-6, np.float32)))
        gamma = self.constant(1 + 0.3 * self.rng.standard_normal(HIDDEN), np.float32)
        return self.op("Mul", self.op("Div", x, root), gamma)

    def length(self, x: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", x), self.constant(axis))

    def embedded(self) -> tuple[str, str]:
        """The stream and the value whose axis 1 is the sequence."""
        spec = self.spec
        if spec.ids == "embedded":
            x = self.input("inputs_embeds", FLOAT, [spec.batch, spec.seq, HIDDEN])
            return x, x
        ids = given = self.input("input_ids", INT64, [spec.batch, spec.seq])
        if spec.unread:
            self.input("pos", INT64, [spec.batch, spec.seq])
        if spec.ids == "clip":
            ids = self.op("Clip", ids, self.constant(0), self.constant(VOCAB - 1))
        elif spec.ids == "where":
            is_image = self.op("Equal", ids, self.constant(VOCAB - 1))
            ids = self.op("Where", is_image, self.constant(0), ids)
        elif spec.ids == "max min":
            ids = self.op("Min", self.op("Max", ids, self.constant(0)), self.constant(VOCAB - 1))
        table = self.constant(self.rng.standard_normal((VOCAB + 2 * (spec.ids == "offset"), HIDDEN)), np.float32)
        if spec.ids == "offset":
            ids = self.op("Add", ids, self.constant(2))
        return self.op("Gather", table, ids), given

    def heads(self, h: str) -> str:
        split = self.op(
            "Reshape", self.op("MatMul", h, self.matrix(HIDDEN, HIDDEN)), self.constant([0, 0, HEADS, HEAD_DIM])
        )
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def masked(self, scores: str, seq: str, total: str) -> str:
        """Scores with what may not be seen pushed down."""
        spec, low, zero = self.spec, self.constant(-1e9, np.float32), self.constant(0, np.float32)
        shapes = {
            "bias": [spec.batch, 1, spec.seq, spec.total],
            "bias heads": [spec.batch, HEADS, spec.seq, spec.total],
            "bias 3d": [spec.batch, spec.seq, spec.total],
            "bool": [spec.batch, 1, spec.seq, spec.total],
        }
        if spec.mask in shapes:
            mask = self.input("attention_mask", BOOL if spec.mask == "bool" else FLOAT, shapes[spec.mask])
            if spec.mask == "bool":
                return self.op("Where", mask, scores, low)
            mask = self.op("Unsqueeze", mask, self.constant([1])) if spec.mask == "bias 3d" else mask
            return self.op("Add", scores, mask)
        start = self.op("Sub", total, seq)
        if spec.number == "past":
            given = self.input("past_length", INT64, list(spec.number_shape))
            start = self.op("Reshape", given, self.constant([], np.int64))
        stop = self.op("Add", start, seq)
        rows = self.op("Reshape", self.op("Range", start, stop, self.constant(1)), self.constant([-1, 1]))
        later = self.op("Greater", self.op("Range", self.constant(0), total, self.constant(1)), rows)
        scores = self.op("Add", scores, self.op("Where", later, low, zero))
        if not spec.mask:
            return scores
        kind = BOOL if spec.mask == "bool 2d" else INT64
        mask = self.input("attention_mask", kind, [spec.batch, spec.total])
        ones = self.op("Cast", self.op("Unsqueeze", mask, self.constant([1, 2])), to=FLOAT)
        hidden = self.op("Sub", self.constant(1, np.float32), ones)
        return self.op("Add", scores, self.op("Mul", hidden, low))

    def head(self, x: str) -> None:
        spec = self.spec
        if spec.number == "keep":
            given = self.input("num_logits_to_keep", INT32 if spec.number_shape else INT64, list(spec.number_shape))
            first = self.op("Reshape", self.op("Neg", self.op("Cast", given, to=INT64)), self.constant([1]))
            x = self.op("Slice", x, first, self.constant([2**31 - 1]), self.constant([1]))
        logits = self.op("MatMul", x, self.matrix(HIDDEN, VOCAB))
        if spec.unknown:
            logits = self.op("Mul", logits, self.input("temperature", FLOAT, [1]))
        self.op("Identity", logits, out="logits")


def build(spec: Spec | None = None, seed: int = 0) -> onnx.ModelProto:
    """The model; equal specs and seeds have the same weights in the same places."""
    spec = spec or Spec()
    out = _Writer(spec, np.random.default_rng(seed))
    x, sequence = out.embedded()
    seq = out.length(sequence, 1)
    h = out.norm(x)
    q, k, v = (out.heads(h) for _ in range(3))
    results = [helper.make_tensor_value_info("logits", FLOAT, [spec.batch, "kept", VOCAB])]
    if spec.past != 0:
        cached = []
        for part, fresh in (("key", k), ("value", v)):
            past = out.input(f"past_key_values.0.{part}", FLOAT, [spec.batch, HEADS, spec.past, HEAD_DIM])
            cached.append(out.op("Concat", past, fresh, out=f"present.0.{part}", axis=2))
            shape = [spec.batch, HEADS, "columns", HEAD_DIM]
            results.append(helper.make_tensor_value_info(cached[-1], FLOAT, shape))
        k, v = cached
    scores = out.op("MatMul", q, out.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = out.op("Mul", scores, out.constant(HEAD_DIM**-0.5, np.float32))
    weights = out.op("Softmax", out.masked(scores, seq, out.length(k, 2)), axis=-1)
    context = out.op("Transpose", out.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    context = out.op("Reshape", context, out.constant([0, 0, HIDDEN]))
    x = out.op("Add", x, out.op("MatMul", context, out.matrix(HIDDEN, HIDDEN)))
    h = out.norm(x)
    gate = out.op("MatMul", h, out.matrix(HIDDEN, WIDE))
    active = out.op("Mul", out.op("Mul", gate, out.op("Sigmoid", gate)), out.op("MatMul", h, out.matrix(HIDDEN, WIDE)))
    x = out.op("Add", x, out.op("MatMul", active, out.matrix(WIDE, HIDDEN)))
    out.head(out.norm(x))
    constants = [numpy_helper.from_array(array, name) for name, array in out.weights.items()]
    graph = helper.make_graph(out.nodes, "odd", out.inputs, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def write(folder: Path, spec: Spec | None = None, seed: int = 0) -> Path:
    """Save the model in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(build(spec, seed), folder / "model.onnx")
    return folder / "model.onnx"
