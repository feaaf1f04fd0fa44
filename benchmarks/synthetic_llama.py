"""A Llama of any size with seeded weights, written weight by weight, to measure on where no trained model is at hand.

    python benchmarks/synthetic_llama.py OUT.onnx --shape llama-2-7b [--layers N] [--dtype float16] [--spelling optimum]

The graph is spelt as onnxruntime-genai's builder spells it (packed qkv_proj, GroupQueryAttention, skip norms) or as
optimum does (norms, RoPE and attention in standard operators), with their names. Weights are cut from one block of
gaussian numbers, W: [in, out] with the deviation 1/sqrt(in): cheap to make, and activations keep their size. The memory
needed is that of the largest weight, the disk that of the model. A tokenizer.json beside it has a token for each byte,
where the vocabulary holds so many, so that commands that calibrate on text run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quarot_onnx.io import model_io

EPSILON = 1e-5
BLOCK = 2**20 + 7  # a prime, so that no row of a weight equals the next one


@dataclass(frozen=True)
class Sizes:
    """What the graph is made of; ``bias``: q, k and v have one."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    theta: float = 1e4
    bias: bool = False
    positions: int = 4096


SHAPES = {
    "llama-2-7b": Sizes(32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": Sizes(128256, 4096, 14336, 32, 32, 8, theta=5e5),
    "qwen2-7b": Sizes(152064, 3584, 18944, 28, 28, 4, theta=1e6, bias=True),
    "tinyllama-1.1b": Sizes(32000, 2048, 5632, 22, 32, 4, head_dim=64),
}


class Graph:
    """Collects nodes, small constants, and the weights as shapes with a way to make them."""

    def __init__(self, sizes: Sizes, dtype: str, seed: int) -> None:
        self.sizes, self.dtype, self.seed = sizes, np.dtype(dtype), seed
        self.kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.weights: dict[str, ir.TensorProtocol] = {}

    def node(self, op: str, name: str, inputs: list[str], outputs: list[str] | None = None, **attributes) -> str:
        outputs = outputs or [f"{name}_output_0"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def constant(self, value: NDArray | float, name: str = "") -> str:
        array = np.asarray(value)
        name = name or f"constant_{array.dtype}_{array.tolist()}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int, gamma: bool = False) -> str:
        """A tensor that is made when it is written: [in, out], or a vector around 1 for a norm."""
        dtype = ir.DataType(self.kind)
        deviation = 0.1 if gamma else shape[0] ** -0.5
        made = cut(self.dtype, crc32(f"{self.seed} {name}".encode()), shape, deviation, float(gamma))
        self.weights[name] = model_io.lazy_tensor(made, dtype=dtype, shape=shape, name=name)
        return name

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        """Write the model; weights are made one by one."""
        stand_ins = [
            onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=self.kind, data_location=1)
            for name, tensor in self.weights.items()
        ]
        for stand_in in stand_ins:
            stand_in.external_data.add(key="location", value="made when written")
        tensors = [*self.constants.values(), *stand_ins]
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
        for name, tensor in self.weights.items():
            model.graph.initializers[name].const_value = tensor
        model_io.save(model, path)

    def interface(self, total: str, *, positions: bool) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """The graph's inputs and outputs."""
        s, tokens = self.sizes, ["batch_size", "sequence_length"]
        names = ["input_ids", *["position_ids"] * positions]
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in names]
        inputs.insert(1, helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [tokens[0], total]))
        outputs = [helper.make_tensor_value_info("logits", self.kind, [*tokens, s.vocab])]
        for layer in range(s.layers):
            for part in ("key", "value"):
                cache = [tokens[0], s.kv_heads, "past_sequence_length", s.head_dim]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", self.kind, cache))
                cache[2] = total
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", self.kind, cache))
        return inputs, outputs


def cut(dtype: np.dtype, start: int, shape: tuple[int, ...], deviation: float, centre: float) -> Callable[[], NDArray]:
    """What cuts a weight from the block, beginning where ``start`` says."""

    def make() -> NDArray:
        return np.resize(np.roll(block(dtype, deviation, centre), start), shape)

    return make


@cache
def block(dtype: np.dtype, deviation: float, centre: float) -> NDArray:
    return (np.random.default_rng(0).standard_normal(BLOCK, np.float32) * deviation + centre).astype(dtype)


def genai(sizes: Sizes, dtype: str, seed: int, path: Path) -> None:
    """The spelling of onnxruntime-genai's builder."""
    g, s, microsoft = Graph(sizes, dtype, seed), sizes, {"domain": "com.microsoft"}
    angle = np.arange(s.positions)[:, None] * s.theta ** (-np.arange(0, s.head_dim, 2) / s.head_dim)
    tables = [g.constant(f(angle).astype(g.dtype), n) for f, n in ((np.cos, "cos_cache"), (np.sin, "sin_cache"))]
    mask = "/model/attn_mask_reformat/attn_mask_subgraph"
    ones = g.node("ReduceSum", f"{mask}/ReduceSum", ["attention_mask", g.constant(np.array([1]))], keepdims=0)
    past = g.node("Sub", f"{mask}/Sub", [ones, g.constant(np.array([1]))])
    past = g.node("Cast", f"{mask}/Sub/Cast", [past], to=TensorProto.INT32)
    shape = g.node("Shape", f"{mask}/Shape", ["attention_mask"])
    total = g.node("Gather", f"{mask}/Gather", [shape, g.constant(np.array(1))])
    total = g.node("Cast", f"{mask}/Gather/Cast", [total], to=TensorProto.INT32)

    def linear(name: str, x: str, rows: int, columns: int) -> str:
        weight = g.weight(f"model.{name.replace('/', '.')}.MatMul.weight", rows, columns)
        return g.node("MatMul", f"/model/{name}/MatMul", [x, weight])

    table = g.weight("model.embed_tokens.weight", s.vocab, s.hidden)
    stream = g.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"])
    gamma = g.weight("model.layers.0.input_layernorm.weight", s.hidden, gamma=True)
    norm = "/model/layers.0/input_layernorm/LayerNorm"
    x = g.node("SimplifiedLayerNormalization", norm, [stream, gamma], axis=-1, epsilon=EPSILON, stash_type=1)

    def skip_norm(name: str, stream: str, y: str) -> tuple[str, str]:
        gamma = g.weight(f"model.{name.replace('/', '.')}.weight", s.hidden, gamma=True)
        outputs = [f"/model/{name}/output_0", "", "", f"/model/{name}/output_3"]
        op = "SkipSimplifiedLayerNormalization"
        g.node(op, f"/model/{name}/SkipLayerNorm", [stream, y, gamma], outputs, epsilon=EPSILON, **microsoft)
        return outputs[0], outputs[3]

    for i in range(s.layers):
        layer, packed = f"layers.{i}", (s.heads + 2 * s.kv_heads) * s.head_dim
        qkv = linear(f"{layer}/attn/qkv_proj", x, s.hidden, packed)
        if s.bias:
            bias = g.weight(f"model.{layer}.attn.qkv_proj.Add.bias", packed)
            qkv = g.node("Add", f"/model/{layer}/attn/qkv_proj/Add", [qkv, bias])
        pasts, presents = ([f"{end}.{i}.{part}" for part in ("key", "value")] for end in ("past_key_values", "present"))
        y = g.node(
            "GroupQueryAttention", f"/model/{layer}/attn/GroupQueryAttention",
            [qkv, "", "", *pasts, past, total, *tables], [f"/model/{layer}/attn/output_0", *presents],
            num_heads=s.heads, kv_num_heads=s.kv_heads, scale=s.head_dim**-0.5, do_rotary=1, **microsoft,
        )  # fmt: skip
        y = linear(f"{layer}/attn/o_proj", y, s.heads * s.head_dim, s.hidden)
        x, stream = skip_norm(f"{layer}/post_attention_layernorm", stream, y)
        y = gated(g, lambda name, x, *shape, layer=layer: linear(f"{layer}/mlp/{name}", x, *shape), layer, x)
        last = "final_norm_layernorm" if i + 1 == s.layers else "input_layernorm"
        x, stream = skip_norm(f"layers.{i + 1}/{last}", stream, y)
    g.node("MatMul", "/lm_head/MatMul", [x, g.weight("lm_head.MatMul.weight", s.hidden, s.vocab)], ["logits"])
    g.save(path, *g.interface("total_sequence_length", positions=False))


def optimum(sizes: Sizes, dtype: str, seed: int, path: Path) -> None:
    """The spelling of optimum: standard operators only, weights named by numbers."""
    g, s = Graph(sizes, dtype, seed), sizes
    number = lambda value: g.constant(np.array(value, g.dtype))  # noqa: E731
    ints = lambda *values: g.constant(np.array(values, np.int64))  # noqa: E731
    mask, cos, sin = shared(g)

    def linear(name: str, x: str, rows: int, columns: int) -> str:
        weight = g.weight(f"onnx::MatMul_{8000 + len(g.weights)}", rows, columns)
        return g.node("MatMul", f"/{name}/MatMul", [x, weight])

    def norm(name: str, x: str) -> str:
        square = g.node("Pow", f"/{name}/Pow", [x, number(2)])
        mean = g.node("ReduceMean", f"/{name}/ReduceMean", [square, ints(-1)])
        root = g.node("Sqrt", f"/{name}/Sqrt", [g.node("Add", f"/{name}/Add", [mean, number(EPSILON)])])
        scaled = g.node("Mul", f"/{name}/Mul", [x, g.node("Div", f"/{name}/Div", [number(1), root])])
        return g.node("Mul", f"/{name}/Mul_1", [g.weight(f"{name}.weight", s.hidden, gamma=True), scaled])

    def heads(part: str, x: str, attn: str, count: int) -> str:
        y = linear(f"{attn}/{part}_proj", x, s.hidden, count * s.head_dim)
        if s.bias:
            bias = g.weight(f"{attn.replace('/', '.')}.{part}_proj.bias", count * s.head_dim)
            y = g.node("Add", f"/{attn}/{part}_proj/Add", [bias, y])
        y = g.node("Reshape", f"/{attn}/{part}_Reshape", [y, ints(0, 0, count, s.head_dim)])
        return g.node("Transpose", f"/{attn}/{part}_Transpose", [y], perm=[0, 2, 1, 3])

    def cached(name: str, x: str, attn: str, part: str) -> str:
        """Joined with the past, and every KV head repeated for its query heads."""
        joined = [f"past_key_values.{name}", x]
        present = g.node("Concat", f"/{attn}/{part}_present", joined, [f"present.{name}"], axis=2)
        groups = s.heads // s.kv_heads
        if groups == 1:
            return present
        five = g.node("Unsqueeze", f"/{attn}/{part}_Unsqueeze", [present, ints(2)])
        wide = g.node("Expand", f"/{attn}/{part}_Expand", [five, ints(1, 1, groups, 1, 1)])
        return g.node("Reshape", f"/{attn}/{part}_repeated", [wide, ints(0, s.heads, -1, s.head_dim)])

    table = g.weight("model.embed_tokens.weight", s.vocab, s.hidden)
    stream = g.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"])
    for i in range(s.layers):
        layer, attn = f"model/layers.{i}", f"model/layers.{i}/self_attn"
        x = norm(f"{layer}/input_layernorm", stream)
        query = rotary(g, f"/{attn}/q", (cos, sin), heads("q", x, attn, s.heads))
        key = cached(f"{i}.key", rotary(g, f"/{attn}/k", (cos, sin), heads("k", x, attn, s.kv_heads)), attn, "k")
        value = cached(f"{i}.value", heads("v", x, attn, s.kv_heads), attn, "v")
        key = g.node("Transpose", f"/{attn}/Transpose", [key], perm=[0, 1, 3, 2])
        scores = g.node("MatMul", f"/{attn}/MatMul", [query, key])
        scores = g.node("Mul", f"/{attn}/Mul", [scores, number(s.head_dim**-0.5)])
        scores = g.node("Softmax", f"/{attn}/Softmax", [g.node("Add", f"/{attn}/Add", [scores, mask])], axis=-1)
        context = g.node("MatMul", f"/{attn}/MatMul_1", [scores, value])
        context = g.node("Transpose", f"/{attn}/Transpose_1", [context], perm=[0, 2, 1, 3])
        context = g.node("Reshape", f"/{attn}/Reshape", [context, ints(0, 0, s.heads * s.head_dim)])
        y = linear(f"{attn}/o_proj", context, s.heads * s.head_dim, s.hidden)
        stream = g.node("Add", f"/{layer}/Add", [stream, y])
        x = norm(f"{layer}/post_attention_layernorm", stream)
        y = gated(g, lambda name, x, *shape, layer=layer: linear(f"{layer}/mlp/{name}", x, *shape), layer, x)
        stream = g.node("Add", f"/{layer}/Add_1", [stream, y])
    head = g.weight(f"onnx::MatMul_{8000 + len(g.weights)}", s.hidden, s.vocab)
    g.node("MatMul", "/lm_head/MatMul", [norm("model/norm", stream), head], ["logits"])
    g.save(path, *g.interface("past_sequence_length + sequence_length", positions=True))


def shared(g: Graph) -> tuple[str, str, str]:
    """What all layers of optimum's spelling read: the mask [batch, 1, sequence, total], cos and sin of RoPE."""
    s = g.sizes
    ints = lambda *values: g.constant(np.array(values, np.int64))  # noqa: E731
    scalar = lambda value: g.constant(np.array(value, np.int64))  # noqa: E731
    shape = g.node("Shape", "/model/Shape", ["past_key_values.0.key"])
    past = g.node("Gather", "/model/Gather", [shape, scalar(2)])
    ids = g.node("Shape", "/model/Shape_1", ["input_ids"])
    total = g.node("Add", "/model/Add", [past, g.node("Gather", "/model/Gather_1", [ids, scalar(1)])])
    rows = g.node("Range", "/model/Range", [past, total, scalar(1)])
    rows = g.node("Unsqueeze", "/model/Unsqueeze", [rows, ints(1)])
    columns = g.node("Range", "/model/Range_1", [scalar(0), total, scalar(1)])
    seen = g.node("LessOrEqual", "/model/LessOrEqual", [columns, rows])
    given = g.node("Cast", "/model/Cast", ["attention_mask"], to=TensorProto.BOOL)
    given = g.node("Unsqueeze", "/model/Unsqueeze_1", [given, ints(1, 2)])
    seen = g.node("And", "/model/And", [seen, given])
    low, none = (g.constant(np.array(value, g.dtype)) for value in (np.finfo(g.dtype).min, 0))
    mask = g.node("Where", "/model/Where", [seen, none, low])

    frequency = (s.theta ** (-np.arange(0, s.head_dim, 2) / s.head_dim)).astype(np.float32)
    at = g.node("Cast", "/model/rotary_emb/Cast", ["position_ids"], to=TensorProto.FLOAT)
    at = g.node("Unsqueeze", "/model/rotary_emb/Unsqueeze", [at, ints(1, 3)])
    angle = g.node("Mul", "/model/rotary_emb/Mul", [at, g.constant(frequency, "inv_freq")])
    angle = g.node("Concat", "/model/rotary_emb/Concat", [angle, angle], axis=-1)
    tables = [g.node(op, f"/model/rotary_emb/{op}", [angle]) for op in ("Cos", "Sin")]
    cos, sin = (g.node("Cast", f"{table}_cast", [table], to=g.kind) for table in tables)
    return mask, cos, sin


def rotary(g: Graph, name: str, tables: tuple[str, str], x: str) -> str:
    """RoPE of x: [batch, heads, sequence, head_dim], in optimum's spelling."""
    ints = lambda *values: g.constant(np.array(values, np.int64))  # noqa: E731
    half, far = g.sizes.head_dim // 2, np.iinfo(np.int64).max
    first = g.node("Slice", f"{name}_Slice", [x, ints(0), ints(half), ints(3)])
    second = g.node("Slice", f"{name}_Slice_1", [x, ints(half), ints(far), ints(3)])
    turned = g.node("Concat", f"{name}_Concat", [g.node("Neg", f"{name}_Neg", [second]), first], axis=-1)
    parts = [g.node("Mul", f"{name}_Mul", [x, tables[0]]), g.node("Mul", f"{name}_Mul_1", [turned, tables[1]])]
    return g.node("Add", f"{name}_Add", parts)


def gated(g: Graph, linear: Callable[..., str], layer: str, x: str) -> str:
    """The MLP, spelt alike in both."""
    base = f"/{layer}/mlp/act_fn"
    gate = linear("gate_proj", x, g.sizes.hidden, g.sizes.intermediate)
    silu = g.node("Mul", f"{base}/Mul", [gate, g.node("Sigmoid", f"{base}/Sigmoid", [gate])])
    wide = g.node("Mul", f"/{layer}/mlp/Mul", [silu, linear("up_proj", x, g.sizes.hidden, g.sizes.intermediate)])
    return linear("down_proj", wide, g.sizes.intermediate, g.sizes.hidden)


def byte_tokens() -> Tokenizer:
    """A tokenizer that takes text byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


SPELLINGS = {"genai": genai, "optimum": optimum}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama with seeded weights.")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="sizes by name (default: the 1.1B)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--spelling", choices=SPELLINGS, default="genai")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    counts = ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")
    for name in counts:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the shape's")
    arguments = parser.parse_args()
    given = {name: value for name in counts if (value := getattr(arguments, name)) is not None}
    sizes, tokenizer = replace(SHAPES[arguments.shape], **given), byte_tokens()
    SPELLINGS[arguments.spelling](sizes, arguments.dtype, arguments.seed, arguments.out)
    if sizes.vocab >= tokenizer.get_vocab_size():
        tokenizer.save(str(arguments.out.with_name("tokenizer.json")))
    files = [arguments.out, *arguments.out.parent.glob(f"{arguments.out.name}.data")]
    print(f"{arguments.out}: {sum(file.stat().st_size for file in files) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
