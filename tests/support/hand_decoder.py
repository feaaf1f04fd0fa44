"""A one-layer decoder at opset 23, written node by node, with every spelling that an exporter may choose.

``input_ids [1, s] -> logits [1, s, VOCAB]``, causal, without RoPE (rotations do not care). Batch 1, so that Gemm's
two-dimensional operands fit between Reshapes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 40, 24, 20, 4, 2, 8

SPELLINGS = (
    "matmul",
    "bias",
    "bias swapped",
    "bias row",
    "gemm",
    "gemm transB",
    "gemm transA",
    "gemm alpha beta",
    "gemm transA transB alpha beta",
    "transposed",
    "float16 cast",
    "identity",
)


@dataclass(frozen=True)
class Spec:
    """What is out of the ordinary.

    Attributes:
        linear: How Linears are spelt, one of ``SPELLINGS``.
        table: ``plain``, ``tied`` (the head transposes the table), ``tied transposed`` (the Gather transposes the
            head's weight) or ``two copies``.
        gamma: ``vectors``, ``shared`` (one for all norms), ``ones`` (equal initializers merged through Identity, as
            TorchScript does), ``used elsewhere``, ``offset`` (stored as γ - 1) or ``offset cast`` (added in float64).
        norm: ``fused``, ``pow div``, ``mul reciprocal``, ``pow -0.5`` or ``merged`` (norms of one value part at γ).
        first_norm: ``""``, ``rms`` or ``layer``: a norm right behind the embedding.
        parallel: The MLP reads what the attention reads.
        last_token: ``""``, ``slice`` or ``gather``: only the last position reaches the head.
        multipliers: Granite's: embeddings, residual branches and logits are scaled.
        computed_scale: The embedding's factor is computed by the graph.
        softcap: tanh on the logits.
        layer_scale: What blocks write is scaled channel by channel.
        attention: ``gqa``, ``interleaved`` (pairs of Q and K are turned, as by an interleaved RoPE), ``repeated``
            (KV heads repeated by Expand), ``tiled`` (by Tile of single heads), ``mha`` (MultiHeadAttention), ``mha
            bias``, ``gated`` (the result is multiplied), ``forked`` (the result is read twice), ``shared cache`` (a
            second attention reads K and V too).
        outputs: An extra output: ``hidden``, ``normed``, ``written`` or ``value``.
        mlps: Number of MLPs; with ``shared_mlp`` they have the same weights.
        shared_mlp: See above.
        intermediate: Width of the MLP.
        down_reader: The down projection's output is read by a second node.
        unnamed: Nodes have no names.
    """

    linear: str = "matmul"
    table: str = "plain"
    gamma: str = "vectors"
    norm: str = "fused"
    first_norm: str = ""
    parallel: bool = False
    last_token: str = ""
    multipliers: bool = False
    computed_scale: bool = False
    softcap: bool = False
    layer_scale: bool = False
    attention: str = "gqa"
    outputs: str = ""
    mlps: int = 1
    shared_mlp: bool = False
    intermediate: int = INTERMEDIATE
    down_reader: bool = False
    unnamed: bool = False


@dataclass
class Writer:
    """Collects nodes and initializers."""

    spec: Spec
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, NDArray] = field(default_factory=dict)

    def node(self, op: str, inputs: list[str], out: str, *more: str, domain: str = "", **attributes: object) -> str:
        name = "" if self.spec.unnamed else f"node_{out}"
        self.nodes.append(helper.make_node(op, inputs, [out, *more], name=name, domain=domain, **attributes))
        return out

    def constant(self, name: str, value: NDArray) -> str:
        self.initializers.setdefault(name, value)
        return name

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def weight(self, name: str, *shape: int) -> NDArray:
        return (self.rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    def linear(self, x: str, name: str, rows: int, columns: int, *, weights: str = "") -> str:
        """``x @ W (+ b)``, x: [1, s, rows], in the chosen spelling; ``weights`` names those to share."""
        how, stem = self.spec.linear, weights or name
        w = self.weight(stem, rows, columns)
        b = 0.3 * self.rng.standard_normal(columns).astype(np.float32)
        if "gemm" in how:
            return self._gemm(x, name, stem, w, b)
        if how == "transposed":
            weight = self.node("Transpose", [self.constant(f"W_{stem}", w.T.copy())], f"{name}_t", perm=[1, 0])
        elif how == "float16 cast":
            weight = self.node(
                "Cast", [self.constant(f"W_{stem}", w.astype(np.float16))], f"{name}_c", to=TensorProto.FLOAT
            )
        elif how == "identity":
            weight = self.node("Identity", [self.constant(f"W_{stem}", w)], f"{name}_i")
        else:
            weight = self.constant(f"W_{stem}", w)
        y = self.node("MatMul", [x, weight], f"{name}_out")
        if "bias" not in how:
            return y
        bias = self.constant(f"b_{stem}", b[None] if how == "bias row" else b)
        return self.node("Add", [bias, y] if how == "bias swapped" else [y, bias], f"{name}_biased")

    def _gemm(self, x: str, name: str, stem: str, w: NDArray, b: NDArray) -> str:
        how = self.spec.linear
        attributes: dict[str, object] = {"alpha": 0.5, "beta": 2.0} if "alpha" in how else {}
        flat = self.node("Reshape", [x, self.ints(f"flat_{w.shape[0]}", -1, w.shape[0])], f"{name}_flat")
        if "transA" in how:
            flat = self.node("Transpose", [flat], f"{name}_flipped", perm=[1, 0])
            attributes["transA"] = 1
        if "transB" in how:
            w = w.T.copy()
            attributes["transB"] = 1
        inputs = [flat, self.constant(f"W_{stem}", w), self.constant(f"b_{stem}", b)]
        y = self.node("Gemm", inputs, f"{name}_gemm", **attributes)
        columns = b.shape[0]
        return self.node("Reshape", [y, self.ints(f"deep_{columns}", 1, -1, columns)], f"{name}_out")

    def gamma(self, name: str) -> str:
        how = self.spec.gamma
        values = self.rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        if how == "shared":
            return self.constant("gamma", values)
        if how == "ones":
            return self.node("Identity", [self.constant("ones", np.ones(HIDDEN, np.float32))], f"gamma_{name}")
        if how == "offset":
            return self.node("Add", [self.constant(f"g_{name}", values - 1), self.number("one", 1.0)], f"gamma_{name}")
        if how == "offset cast":
            stored = self.constant(f"g_{name}", values.astype(np.float64) - 1)
            total = self.node("Add", [self.constant("one64", np.array(1.0)), stored], f"gamma64_{name}")
            return self.node("Cast", [total], f"gamma_{name}", to=TensorProto.FLOAT)
        return self.constant(f"g_{name}", values)

    def norm(self, x: str, name: str) -> str:
        gamma, how = self.gamma(name), self.spec.norm
        if how == "fused":
            return self.node("RMSNormalization", [x, gamma], f"{name}_normed", axis=-1, epsilon=1e-6)
        if how == "merged" and any(f"{x}_scaled" in node.output for node in self.nodes):
            return self.node("Mul", [gamma, f"{x}_scaled"], f"{name}_normed")
        if how == "mul reciprocal":
            square = self.node("Mul", [x, x], f"{name}_square")
        else:
            square = self.node("Pow", [x, self.number("two", 2.0)], f"{name}_square")
        # The last of three axes, counted from the front.
        axes = self.ints("axis", 2) if how == "pow -0.5" else self.ints("axis", -1)
        mean = self.node("ReduceMean", [square, axes], f"{name}_mean", keepdims=1)
        safe = self.node("Add", [self.number("epsilon", 1e-6), mean], f"{name}_safe")
        if how == "pow -0.5":
            root = self.node("Pow", [safe, self.number("minus_half", -0.5)], f"{name}_rsqrt")
            scaled = self.node("Mul", [root, x], f"{name}_scaled")
        elif how == "pow div":
            root = self.node("Pow", [safe, self.number("half", 0.5)], f"{name}_sqrt")
            scaled = self.node("Div", [x, root], f"{name}_scaled")
        else:
            root = self.node("Sqrt", [safe], f"{name}_sqrt")
            inverse = self.node("Reciprocal", [root], f"{name}_rsqrt")
            scaled = self.node("Mul", [x, inverse], f"{x if how == 'merged' else name}_scaled")
        return self.node("Mul", [gamma, scaled], f"{name}_normed")

    def written(self, x: str) -> str:
        """What a block writes to the residual stream."""
        if self.spec.layer_scale:
            factors = self.rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            x = self.node("Mul", [x, self.constant(f"{x}_factors", factors)], f"{x}_layer_scaled")
        return self.scaled(x, 0.22) if self.spec.multipliers else x

    def scaled(self, x: str, factor: float) -> str:
        return self.node("Mul", [x, self.number(f"times_{factor}", factor)], f"{x}_times")

    def attention(self, x: str) -> str:
        how, query, key = self.spec.attention, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        kv = query if how.startswith("mha") else key
        q, k = self.linear(x, "q", HIDDEN, query), self.linear(x, "k", HIDDEN, kv)
        v = self.linear(x, "v", HIDDEN, kv)
        causal: dict[str, object] = {"is_causal": 1, "q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
        if how.startswith("mha"):
            bias = [self.constant("b_qkv", self.weight("qkv", 3 * query))] if how == "mha bias" else []
            return self.node(
                "MultiHeadAttention",
                [q, k, v, *bias],
                "context",
                domain="com.microsoft",
                num_heads=HEADS,
                unidirectional=1,
            )
        if how == "interleaved":
            q, k = self.turned_pairs(q, HEADS), self.turned_pairs(k, KV_HEADS)
        if how in ("repeated", "tiled"):
            k, v = (self.repeated(value, name) for value, name in ((k, "k"), (v, "v")))
            causal["kv_num_heads"] = HEADS
        context = self.node("Attention", [q, k, v], "context", **causal)
        if how == "gated":
            gate = self.node("Sigmoid", [self.linear(x, "attention_gate", HIDDEN, query)], "attention_gates")
            context = self.node("Mul", [context, gate], "gated_context")
        if how == "shared cache":
            self.node("Attention", [self.linear(x, "q2", HIDDEN, query), k, v], "context2", **causal)
        return context

    def turned_pairs(self, x: str, heads: int) -> str:
        """(a, b) -> (-b, a) in every pair of neighbours of [1, s, heads · HEAD_DIM]."""
        pairs = self.node("Reshape", [x, self.ints(f"pairs_{heads}", 1, -1, heads, HEAD_DIM // 2, 2)], f"{x}_pairs")
        first, second = (
            self.node("Gather", [pairs, self.ints(f"entry_{i}", i)], f"{x}_entry_{i}", axis=-1) for i in (0, 1)
        )
        turned = self.node("Concat", [self.node("Neg", [second], f"{x}_minus"), first], f"{x}_turned", axis=-1)
        return self.node("Reshape", [turned, self.ints(f"heads_{heads}", 1, -1, heads * HEAD_DIM)], f"{x}_rope")

    def repeated(self, x: str, name: str) -> str:
        """KV heads of [1, s, KV_HEADS · HEAD_DIM], each as often as there are query heads to it, packed again."""
        groups = HEADS // KV_HEADS
        five = self.node("Reshape", [x, self.ints("five", 1, -1, KV_HEADS, 1, HEAD_DIM)], f"{name}_five")
        if self.spec.attention == "tiled":
            wide = self.node("Tile", [five, self.ints("times", 1, 1, 1, groups, 1)], f"{name}_wide")
        else:
            wide = self.node("Expand", [five, self.ints("to", 1, 1, KV_HEADS, groups, HEAD_DIM)], f"{name}_wide")
        return self.node("Reshape", [wide, self.ints("packed", 1, -1, HEADS * HEAD_DIM)], f"{name}_repeated")

    def mlp(self, x: str, index: int) -> str:
        name, wide = f"mlp{index}", self.spec.intermediate
        weights = "mlp" if self.spec.shared_mlp else name
        gate = self.linear(x, f"{name}_gate", HIDDEN, wide, weights=f"{weights}_gate")
        up = self.linear(x, f"{name}_up", HIDDEN, wide, weights=f"{weights}_up")
        active = self.node("Mul", [self.node("Sigmoid", [gate], f"{name}_sigmoid"), up], f"{name}_active")
        return self.linear(active, f"{name}_down", wide, HIDDEN, weights=f"{weights}_down")

    def embedding(self) -> str:
        table = self.rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
        turned = self.spec.table == "tied transposed"
        source = self.constant("table", table.T.copy() if turned else table)
        if turned:
            source = self.node("Transpose", [source], "table_t", perm=[1, 0])
        x = self.node("Gather", [source, "input_ids"], "embedded")
        if self.spec.multipliers:
            x = self.scaled(x, 12.0)
        if self.spec.computed_scale:
            sums = self.node("ReduceSum", ["input_ids"], "sum", keepdims=0)
            wide = self.node("Cast", [sums], "sum_f", to=TensorProto.FLOAT)
            x = self.node("Mul", [x, self.node("Sigmoid", [wide], "factor")], "x_scaled")
        if self.spec.first_norm == "rms":
            return self.norm(x, "first")
        if self.spec.first_norm == "layer":
            return self.node("LayerNormalization", [x, self.gamma("first")], "first_normed", axis=-1)
        return x

    def block_output(self, context: str) -> str:
        o = self.linear(context, "o", HEADS * HEAD_DIM, HIDDEN)
        if self.spec.attention in ("forked", "shared cache"):
            second = "context2" if self.spec.attention == "shared cache" else context
            o = self.node("Add", [o, self.linear(second, "o2", HEADS * HEAD_DIM, HIDDEN)], "o_sum")
        return self.written(o)

    def head(self, last: str) -> None:
        if self.spec.last_token == "slice":
            ends = [self.ints("minus_one", -1), self.ints("far", 2**62), self.ints("axis_one", 1)]
            last = self.node("Slice", [last, *ends], "last")
        elif self.spec.last_token == "gather":
            last = self.node("Gather", [last, self.ints("minus_one", -1)], "last", axis=1)
        if self.spec.table == "plain":
            logits = self.linear(last, "head", HIDDEN, VOCAB)
        else:
            logits = self.node("MatMul", [last, self.head_weight()], "raw")
        if self.spec.multipliers:
            logits = self.node("Div", [logits, self.number("eight", 8.0)], "divided")
        if self.spec.softcap:
            logits = self.node("Tanh", [logits], "capped")
        self.node("Identity", [logits], "logits")

    def head_weight(self) -> str:
        if self.spec.table == "tied":
            return self.node("Transpose", ["table"], "head_t", perm=[1, 0])
        return (
            "table"
            if self.spec.table == "tied transposed"
            else self.constant("copy", self.initializers["table"].T.copy())
        )


def build(spec: Spec | None = None, *, seed: int = 0) -> onnx.ModelProto:
    """The model; equal specs and seeds give equal models."""
    spec = spec or Spec()
    out = Writer(spec, np.random.default_rng(seed))
    x = out.embedding()
    o = out.block_output(out.attention(out.norm(x, "n0")))
    x = out.node("Add", [x, o], "x1")
    for index in range(spec.mlps):
        down = out.mlp(out.norm("embedded" if spec.parallel else x, f"n{index + 1}"), index)
        x = out.node("Add", [out.written(down), x], f"x{index + 2}")
    out.head(out.norm(x, "final"))
    extra = {"hidden": "x1", "normed": "n0_normed", "written": "o_out", "value": "v_out"}.get(spec.outputs)
    if spec.gamma == "used elsewhere":
        extra = out.node("Mul", ["g_n0", out.number("three", 3.0)], "gamma_elsewhere")
    if spec.down_reader:
        extra = out.node("Exp", ["mlp0_down_out"], "down_read")
    return _model(out, extra)


def _model(out: Writer, extra: str | None) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "s"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "t", VOCAB])]
    if extra:
        outputs.append(helper.make_tensor_value_info(extra, TensorProto.FLOAT, None))
    constants = [numpy_helper.from_array(array, name) for name, array in out.initializers.items()]
    graph = helper.make_graph(out.nodes, "hand", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 23)]
    if any(node.domain for node in out.nodes):
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write(folder: Path, spec: Spec | None = None, *, seed: int = 0) -> Path:
    """Save the model in ``folder``."""
    path = folder / "model.onnx"
    onnx.save(build(spec, seed=seed), path)
    return path
