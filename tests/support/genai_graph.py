"""A decoder in the spelling of the onnxruntime-genai model builder (CPU, opset 22), written node by node.

Fused com.microsoft GroupQueryAttention and SkipSimplifiedLayerNormalization, one packed ``qkv_proj``, an embedding that
gathers from the transposed head, lengths derived from attention_mask, and the builder's names for nodes and weights.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 64, 96, 4, 2, 32, 128
QUERY, KEY = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
EPSILON = 1e-6
MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
PAST_LENGTH, TOTAL_LENGTH = f"{MASK}/Sub/Cast/output_0", f"{MASK}/Gather/Cast/output_0"


class GenaiGraph:
    """Collects nodes and initializers; one method for each part of the builder's graph."""

    def __init__(self, *, dtype: str, seed: int) -> None:
        self.numpy_dtype = {"fp32": np.float32, "fp16": np.float16}[dtype]
        self.onnx_dtype = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[dtype]
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.names: set[str] = set()

    def node(
        self,
        op: str,
        name: str,
        inputs: list[str],
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: object,
    ) -> str:
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, value: NDArray[np.float64]) -> str:
        self.initializers.append(numpy_helper.from_array(value.astype(self.numpy_dtype), name))
        return name

    def linear(self, path: str, x: str, rows: int, columns: int) -> str:
        """x @ W, W: [in, out] = [rows, columns] such that the variance of x is kept."""
        name = f"model.{path.replace('/', '.')}.MatMul.weight"
        weight = self.weight(name, self.rng.normal(0, rows**-0.5, (rows, columns)))
        return self.node("MatMul", f"/model/{path}/MatMul", [x, weight])

    def gamma(self, name: str, size: int) -> str:
        return self.weight(name, self.rng.uniform(0.5, 1.5, size))

    def constant(self, value: int | list[int]) -> str:
        name = f"/model/constants/INT64/{value}"
        if name not in self.names:
            self.names.add(name)
            tensor = numpy_helper.from_array(np.array(value, np.int64))
            self.node("Constant", f"/model/constant_nodes/INT64/{value}", [], [name], value=tensor)
        return name

    def lengths(self) -> None:
        """attention_mask: [batch, total] -> past length of each row: [batch] int32, total length: int32."""
        total = self.node("ReduceSum", f"{MASK}/ReduceSum", ["attention_mask", self.constant([1])], keepdims=0)
        past = self.node("Sub", f"{MASK}/Sub", [total, self.constant([1])])
        self.node("Cast", f"{MASK}/Sub/Cast", [past], to=TensorProto.INT32)
        shape = self.node("Shape", f"{MASK}/Shape", ["attention_mask"])
        length = self.node("Gather", f"{MASK}/Gather", [shape, self.constant(1)], axis=0)
        self.node("Cast", f"{MASK}/Gather/Cast", [length], to=TensorProto.INT32)

    def rotary_cache(self) -> None:
        frequency = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = np.arange(POSITIONS)[:, None] * frequency
        self.weight("cos_cache", np.cos(angle))
        self.weight("sin_cache", np.sin(angle))

    def skip_norm(self, name: str, weight: str, skip: str, x: str, *, last: bool = False) -> tuple[str, str]:
        """The norm of skip + x, and that sum (empty for the last norm, which does not return it)."""
        base = f"/model/{name}"
        total = "" if last else f"{base}/output_3"
        outputs = [f"{base}/output_0"] if last else [f"{base}/output_0", "", "", total]
        inputs = [skip, x, self.gamma(f"model.{weight}", HIDDEN)]
        self.node(
            "SkipSimplifiedLayerNormalization",
            f"{base}/SkipLayerNorm",
            inputs,
            outputs,
            "com.microsoft",
            epsilon=EPSILON,
        )
        return outputs[0], total

    def projection(self, layer: int, name: str, x: str, columns: int, *, bias: bool) -> str:
        y = self.linear(f"layers.{layer}/attn/{name}_proj", x, HIDDEN, columns)
        if not bias:
            return y
        values = self.weight(f"model.layers.{layer}.attn.{name}_proj.Add.bias", self.rng.normal(0, 0.3, columns))
        return self.node("Add", f"/model/layers.{layer}/attn/{name}_proj/Add", [y, values])

    def head_norm(self, layer: int, name: str, x: str, size: int) -> str:
        """RMS norm over each head of x: [batch, sequence, size], through [batch, sequence * heads, head_dim]."""
        base = f"/model/layers.{layer}/attn/{name}_norm"
        heads = self.node("Reshape", f"{base}/Reshape_1", [x, self.constant([0, -1, HEAD_DIM])])
        inputs = [heads, self.gamma(f"model.layers.{layer}.attn.{name}_norm.layernorm.weight", HEAD_DIM)]
        y = self.node(
            "SimplifiedLayerNormalization",
            f"{base}/SimplifiedLayerNormalization",
            inputs,
            axis=-1,
            epsilon=EPSILON,
            stash_type=1,
        )
        return self.node("Reshape", f"{base}/Reshape_2", [y, self.constant([0, -1, size])])

    def attention(
        self, layer: int, x: str, *, packed_qkv: bool, bias: bool, qk_norm: bool, rotary_outside: bool
    ) -> str:
        base = f"/model/layers.{layer}/attn"
        if packed_qkv:
            qkv = [self.projection(layer, "qkv", x, QUERY + 2 * KEY, bias=bias), "", ""]
        else:
            qkv = [
                self.projection(layer, name, x, size, bias=bias)
                for name, size in (("q", QUERY), ("k", KEY), ("v", KEY))
            ]
        for i, (name, size) in enumerate((("q", QUERY), ("k", KEY))):
            if qk_norm:
                qkv[i] = self.head_norm(layer, name, qkv[i], size)
            if rotary_outside:
                inputs = [qkv[i], "position_ids", "cos_cache", "sin_cache"]
                attributes = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}
                qkv[i] = self.node(
                    "RotaryEmbedding",
                    f"{base}/{name}_rotary/RotaryEmbedding",
                    inputs,
                    None,
                    "com.microsoft",
                    **attributes,
                )
        caches = ["", ""] if rotary_outside else ["cos_cache", "sin_cache"]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        y = self.node(
            "GroupQueryAttention",
            f"{base}/GroupQueryAttention",
            [*qkv, *past, PAST_LENGTH, TOTAL_LENGTH, *caches, "", "", ""],
            [f"{base}/GroupQueryAttention/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            "com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            scale=HEAD_DIM**-0.5,
            local_window_size=-1,
            softcap=0.0,
            do_rotary=int(not rotary_outside),
            rotary_interleaved=0,
        )
        return self.linear(f"layers.{layer}/attn/o_proj", y, QUERY, HIDDEN)

    def mlp(self, layer: int, x: str) -> str:
        base = f"/model/layers.{layer}/mlp"
        gate = self.linear(f"layers.{layer}/mlp/gate_proj", x, HIDDEN, INTERMEDIATE)
        up = self.linear(f"layers.{layer}/mlp/up_proj", x, HIDDEN, INTERMEDIATE)
        sigmoid = self.node("Sigmoid", f"{base}/act_fn/Sigmoid", [gate])
        silu = self.node("Mul", f"{base}/act_fn/Mul", [gate, sigmoid])
        product = self.node("Mul", f"{base}/Mul", [silu, up])
        return self.linear(f"layers.{layer}/mlp/down_proj", product, INTERMEDIATE, HIDDEN)

    def embedding(self, vocab: int, *, tied_transposed: bool) -> str:
        head = self.rng.normal(0, HIDDEN**-0.5, (HIDDEN, vocab))
        self.weight("lm_head.MatMul.weight", head)
        if tied_transposed:
            table = self.node("Transpose", "/model/embed_tokens/Transpose", ["lm_head.MatMul.weight"], perm=[1, 0])
        else:
            table = self.weight("model.embed_tokens.weight", self.rng.normal(0, 1, (vocab, HIDDEN)))
        return self.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"])

    def value(self, name: str, shape: list[int | str], *, integer: bool = False) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT64 if integer else self.onnx_dtype, shape)


def write(
    folder: Path,
    *,
    vocab: int,
    layers: int,
    packed_qkv: bool,
    bias: bool,
    qk_norm: bool,
    rotary_outside: bool,
    tied_transposed: bool,
    dtype: str,
    seed: int,
) -> None:
    """Write ``model.onnx``, its data and ``genai_config.json`` into ``folder``; see ``exports.genai_like``."""
    graph = GenaiGraph(dtype=dtype, seed=seed)
    graph.lengths()
    graph.rotary_cache()
    stream = graph.embedding(vocab, tied_transposed=tied_transposed)
    first = [stream, graph.gamma("model.layers.0.input_layernorm.weight", HIDDEN)]
    x = "/model/layers.0/input_layernorm/output_0"
    graph.node(
        "SimplifiedLayerNormalization",
        "/model/layers.0/input_layernorm/LayerNorm",
        first,
        [x],
        axis=-1,
        epsilon=EPSILON,
        stash_type=1,
    )
    for layer in range(layers):
        y = graph.attention(layer, x, packed_qkv=packed_qkv, bias=bias, qk_norm=qk_norm, rotary_outside=rotary_outside)
        here = f"layers.{layer}"
        x, stream = graph.skip_norm(
            f"{here}/post_attention_layernorm", f"{here}.post_attention_layernorm.weight", stream, y
        )
        y = graph.mlp(layer, x)
        last = layer == layers - 1
        norm = "final_norm_layernorm" if last else "input_layernorm"
        x, stream = graph.skip_norm(
            f"layers.{layer + 1}/{norm}", f"layers.{layer + 1}.{norm}.weight", stream, y, last=last
        )
    graph.node("MatMul", "/lm_head/MatMul", [x, "lm_head.MatMul.weight"], ["logits"])

    tokens: list[int | str] = ["batch_size", "sequence_length"]
    inputs = [graph.value("input_ids", tokens, integer=True)]
    inputs.append(graph.value("attention_mask", ["batch_size", "total_sequence_length"], integer=True))
    if rotary_outside:
        inputs.append(graph.value("position_ids", tokens, integer=True))
    outputs = [graph.value("logits", [*tokens, vocab])]
    for part in ("key", "value"):
        for layer in range(layers):
            cache: list[int | str] = ["batch_size", KV_HEADS, "past_sequence_length", "kv_cache_dim"]
            inputs.append(graph.value(f"past_key_values.{layer}.{part}", cache))
            cache[2] = "total_sequence_length"
            outputs.append(graph.value(f"present.{layer}.{part}", cache))
    save(graph, inputs, outputs, folder)
    config = {
        "head_size": HEAD_DIM,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
    }
    text = json.dumps(
        {"model": {"type": "llama", "vocab_size": vocab, "context_length": POSITIONS, "decoder": config}}, indent=2
    )
    (folder / "genai_config.json").write_text(text)


def save(
    graph: GenaiGraph, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], folder: Path
) -> None:
    body = helper.make_graph(graph.nodes, "main_graph", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=10, producer_name="onnxruntime-genai")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
