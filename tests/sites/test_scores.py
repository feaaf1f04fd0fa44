"""What lies between Q, K and V: seen through, and whether an attention changes where all scores are raised alike."""

from collections.abc import Callable
from pathlib import Path

import cached_decoder as cached
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.pipeline import rotate
from quarot_onnx.sites.scores import same_when_raised

HEADS, TOKENS, WIDTH = 2, 5, 4
SHAPE = [1, HEADS, TOKENS, WIDTH]

Nodes = list[onnx.NodeProto]
Step = Callable[[str], Nodes]
"""From the name of the scores to nodes, the last of which puts out ``masked``."""


def constant(name: str, value: np.ndarray | float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value, np.float32)))


def step(op: str, *operands: str, before: Nodes | None = None, **attributes: object) -> Nodes:
    return [*(before or []), helper.make_node(op, operands, ["masked"], **attributes)]


COLUMNS, ROWS = np.linspace(0.5, 1.5, TOKENS), np.linspace(0.5, 1.5, TOKENS)[:, None]
STEPS: dict[str, tuple[Step, bool]] = {
    "nothing": (lambda s: step("Identity", s), True),
    "a scale": (lambda s: step("Mul", "c", s, before=[constant("c", 0.5)]), True),
    "a divisor": (lambda s: step("Div", s, "c", before=[constant("c", 2.0)]), True),
    "a mask": (lambda s: step("Add", s, "mask"), True),
    "a mask that chooses": (lambda s: step("Where", "seen", s, "c", before=[constant("c", -np.inf)]), True),
    "taken from a mask": (lambda s: step("Sub", "mask", s), True),
    "a scale for each query": (lambda s: step("Mul", s, "c", before=[constant("c", ROWS)]), True),
    "a scale for each key": (lambda s: step("Mul", s, "c", before=[constant("c", COLUMNS)]), False),
    "a divisor of them": (lambda s: step("Div", "c", s, before=[constant("c", 2.0)]), False),
    "a cap": (lambda s: step("Tanh", s), False),
    "a lower bound": (lambda s: step("Max", s, "c", before=[constant("c", 0.1)]), False),
    "their square": (lambda s: step("Mul", s, s), False),
}


def spelt(build: Step, *, shown: bool = False, axis: int = -1) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"]),
        *build("scores"),
        helper.make_node("Softmax", ["masked"], ["shares"], axis=axis),
        helper.make_node("MatMul", ["shares", "v"], ["context"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("q", "k", "v")]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [TOKENS, TOKENS]))
    inputs.append(helper.make_tensor_value_info("seen", TensorProto.BOOL, [TOKENS, TOKENS]))
    outputs = [helper.make_tensor_value_info("context", TensorProto.FLOAT, SHAPE)]
    if shown:
        outputs.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, HEADS, TOKENS, TOKENS]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def grouped(**attributes: object) -> onnx.ModelProto:
    """A GroupQueryAttention, with a score of its sink where ``sink`` says so."""
    sink, shown = attributes.pop("sink", False), attributes.pop("shown", False)
    inputs = ["q", "k", "v", "past_k", "past_v", "lengths", "total", *[""] * 4, *["sink"] * bool(sink)]
    outputs = ["context", "present_k", "present_v", *["scores"] * bool(shown)]
    if shown:
        attributes["qk_output"] = 1
    packed = [1, TOKENS, HEADS * 8]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        **attributes,
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, packed) for name in ("q", "k", "v")]
    pasts = [helper.make_tensor_value_info(f"past_{n}", TensorProto.FLOAT, [1, HEADS, 0, 8]) for n in "kv"]
    constants = [
        numpy_helper.from_array(np.array([TOKENS - 1], np.int32), "lengths"),
        numpy_helper.from_array(np.array(TOKENS, np.int32), "total"),
        *[numpy_helper.from_array(np.array([0.5, 1.0], np.float32), "sink")] * bool(sink),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "g", values + pasts, results, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def changes(model: onnx.ModelProto) -> bool:
    """Whether any output changes where a vector is added to all keys."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.name == "seen":
            feeds[value.name] = np.tril(np.ones((TOKENS, TOKENS), bool))
        else:
            feeds[value.name] = rng.standard_normal(value.shape).astype(np.float32)
    names = [value.name for value in session.get_outputs() if not value.name.startswith("present")]
    heads = feeds["k"].shape[-1]
    raised = feeds | {"k": feeds["k"] + np.linspace(-1, 1, heads, dtype=np.float32)}
    pairs = zip(session.run(names, feeds), session.run(names, raised), strict=True)
    return any(np.abs(a - b).max() > 1e-4 for a, b in pairs)


def seen(model: onnx.ModelProto) -> bool:
    read = ir.from_proto(model)
    node = next(n for n in read.graph if n.op_type in {"Softmax", "GroupQueryAttention"})
    return same_when_raised(node, Shapes(read))


@pytest.mark.parametrize("case", STEPS)
def test_what_stands_between_scores_and_softmax(case: str) -> None:
    build, same = STEPS[case]
    assert changes(spelt(build)) is not same
    assert seen(spelt(build)) is same


def test_scores_that_others_read() -> None:
    model = spelt(STEPS["a scale"][0], shown=True)
    assert changes(model)
    assert not seen(model)


def test_a_softmax_over_queries() -> None:
    model = spelt(STEPS["a scale"][0], axis=2)
    assert changes(model)
    assert not seen(model)
    assert seen(spelt(STEPS["a scale"][0], axis=3))


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"softcap": 0.5}, False),
        ({"smooth_softmax": 1}, False),
        ({"sink": True}, False),
        ({"shown": True}, False),
    ],
)
def test_fused_operators(options: dict[str, object], same: bool) -> None:
    assert changes(grouped(**options)) is not same
    assert seen(grouped(**options)) is same


def with_sinks(node: onnx.NodeProto, layer: int) -> tuple[Nodes, Nodes]:
    """Beside the scores that of a sink, whose share is taken off again (gpt-oss)."""
    before = [
        helper.make_node("ReduceMax", [*node.input, "last"], [f"sink{layer}"], keepdims=1),
        helper.make_node("Concat", [*node.input, f"sink{layer}"], [f"all{layer}"], axis=-1),
        helper.make_node("Sub", [f"all{layer}", f"sink{layer}"], [f"less{layer}"]),
    ]
    after = [helper.make_node("Slice", [f"shares{layer}", "i0_", "last", "last"], node.output)]
    return before, after


def with_heads_as_batches(node: onnx.NodeProto, layer: int) -> tuple[Nodes, Nodes]:
    """The shares change their layout on the way to V (Bloom)."""
    return [], [helper.make_node("Reshape", [f"shares{layer}", "as they are"], node.output)]


@pytest.mark.parametrize("spelling", [with_sinks, with_heads_as_batches])
def test_what_stands_around_a_softmax_is_seen_through(spelling, tmp_path: Path) -> None:
    model = cached.build()
    nodes: Nodes = []
    for node in model.graph.node:
        if node.op_type == "Softmax":
            layer = int(node.name[-1])
            before, after = spelling(node, layer)
            read = before[-1].output if before else node.input
            softmax = helper.make_node("Softmax", read, [f"shares{layer}"], name=node.name, axis=-1)
            nodes += [*before, softmax, *after]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "i0_"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, -1]), "as they are"))
    done = rotate(cached.save(model, tmp_path), tmp_path / "rotated.onnx", QuarotConfig(r3=True))
    assert done.equivalence is not None
    assert done.equivalence.passed
    counts = done.recipe["rotation"]["counts"]
    assert (counts["R2"], counts["R3"]) == (2, 2)
