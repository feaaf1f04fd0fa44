"""Stages and segments: in order, in every exporter's spelling, and together they are the whole model."""

from collections.abc import Callable
from pathlib import Path

import exports
import hand_decoder
import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from renaming import rename_all
from stage_runs import decoder_stages, feeds_of, plain_stages, segment_run, whole_runs

from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.stages.blocks import Segments, Stage, find_stages

node = helper.make_node

LLAMA, MERGED_QKV, MERGED_ALL = (3, 1, 2, 1), (1, 1, 2, 1), (1, 1, 1, 1)
EXPORTS: dict[str, tuple[Callable[[], Path], tuple[int, ...]]] = {
    "optimum llama": (lambda: exports.optimum_export("llama"), LLAMA),
    "optimum mha": (lambda: exports.optimum_export("llama", num_key_value_heads=4), LLAMA),
    "optimum tied": (lambda: exports.optimum_export("llama", tied=True), LLAMA),
    "optimum float16": (lambda: exports.optimum_export("llama", dtype="fp16"), LLAMA),
    "optimum qwen2": (lambda: exports.optimum_export("qwen2"), LLAMA),
    "optimum qwen3": (lambda: exports.optimum_export("qwen3"), LLAMA),
    "optimum phi3": (lambda: exports.optimum_export("phi3"), MERGED_ALL),
    "optimum gemma3": (lambda: exports.optimum_export("gemma3_text"), LLAMA),
    "optimum olmo2": (lambda: exports.optimum_export("olmo2"), LLAMA),
    "dynamo llama": (lambda: exports.dynamo_export("llama"), LLAMA),
    "dynamo with cache": (lambda: exports.dynamo_export("llama", with_cache=True), LLAMA),
    "dynamo opset 23": (lambda: exports.dynamo_export("llama", opset=23, with_cache=True), LLAMA),
    "dynamo phi3": (lambda: exports.dynamo_export("phi3"), MERGED_ALL),
    "genai": (exports.genai_like, MERGED_QKV),
    "genai bias": (lambda: exports.genai_like(packed_qkv=False, bias=True), LLAMA),
    "genai float16": (lambda: exports.genai_like(dtype="fp16"), MERGED_QKV),
    "opset 23 module": (exports.opset23_module_export, LLAMA),
}


def same(given: NDArray, expected: NDArray, tolerance: float = 2e-6) -> None:
    """Equal up to a few roundings of a float32, relative to the largest value.

    Only up to the order of sums: onnxruntime fuses a segment's ends in another way than the whole.
    """
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    assert np.abs(given.astype(np.float64) - expected).max() <= tolerance * np.abs(expected.astype(np.float64)).max()


def same_inputs(model: ir.Model, stages: tuple[Stage, ...], feeds: dict[str, NDArray]) -> list[set[str]]:
    """Compare the two ways to the stages' inputs; gives what is held after each segment."""
    found, kept = segment_run(model, stages, feeds)
    expected = whole_runs(model, list(found), [feeds])[0]
    half = any(value.dtype is ir.DataType.FLOAT16 for value in model.graph.initializers.values())
    for name, array in found.items():
        same(array, expected[name], 4e-3 if half else 2e-6)  # float16 rounds to 5e-4
    return kept


@pytest.mark.parametrize("export", EXPORTS)
def test_stages_are_in_true_order_and_segments_are_the_model(export: str) -> None:
    build, sizes = EXPORTS[export]
    path = build()
    model = model_io.load(path)
    stages = decoder_stages(model)
    assert [len(stage.linears) for stage in stages] == [*sizes, *sizes]
    assert [stage.block for stage in stages] == [0] * 4 + [1] * 4
    for stage in stages:
        assert all(linear.input is stage.input for linear in stage.linears)
    kept = same_inputs(model, stages, feeds_of(path)[0])
    # Where both blocks have begun, the second holds nothing that the first did not: what grows is the model's own.
    assert len(kept[4]) <= max(len(held) for held in kept[:4])
    assert len(kept[7]) == 1, "in the end the last input is left"


def test_without_known_starts_all_is_one_block() -> None:
    """GPT-NeoX interleaves Q, K and V; the stages are found all the same."""
    path = exports.optimum_export("gpt_neox")
    model = model_io.load(path)
    stages = plain_stages(model)
    assert [len(stage.linears) for stage in stages] == [1] * 9, "with the head"
    assert {stage.block for stage in stages} == {0}
    same_inputs(model, stages, feeds_of(path)[0])


def test_names_play_no_part(llama_optimum: Path) -> None:
    def load(*, renamed: bool) -> ir.Model:
        model = model_io.load(llama_optimum)
        inputs = [value.name for value in model.graph.inputs]
        if renamed:
            rename_all(model, node_names=False)
            for value, name in zip(model.graph.inputs, inputs, strict=True):
                value.name = name
        return model

    found = []
    for renamed in (False, True):
        model = load(renamed=renamed)
        inputs, kept = segment_run(model, decoder_stages(model), feeds_of(llama_optimum)[0])
        found.append((list(inputs.values()), [len(held) for held in kept]))
    assert found[0][1] == found[1][1]
    for plain, other in zip(found[0][0], found[1][0], strict=True):
        same(other, plain)


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_nodes_will_do(seed: int, llama_optimum: Path) -> None:
    model = model_io.load(llama_optimum)
    stages = decoder_stages(model)
    expected = [sorted(linear.name for linear in stage.linears) for stage in stages]
    shuffle(model.graph, seed)
    again = decoder_stages(model)
    assert [sorted(linear.name for linear in stage.linears) for stage in again] == expected
    assert [stage.block for stage in again] == [stage.block for stage in stages]
    same_inputs(model, again, feeds_of(llama_optimum)[0])


def shuffle(graph: ir.Graph, seed: int) -> None:
    """Another topological order, drawn at random."""
    rng = np.random.default_rng(seed)
    nodes = list(graph)
    waiting = {n: len({p for p in n.predecessors() if p.graph is graph}) for n in nodes}
    ready = [n for n in nodes if not waiting[n]]
    order = []
    while ready:
        chosen = ready.pop(int(rng.integers(len(ready))))
        order.append(chosen)
        for follower in dict.fromkeys(chosen.successors()):
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    assert len(order) == len(nodes)
    assert order != nodes
    for n in nodes:
        graph.remove(n)
    graph.extend(order)


def test_what_is_carried_does_not_grow_with_depth(tmp_path: Path) -> None:
    path = hand_decoder.write(tmp_path, hand_decoder.Spec(mlps=6))
    model = model_io.load(path)
    stages = decoder_stages(model)
    assert [len(stage.linears) for stage in stages] == [3, 1, *[2, 1] * 6]
    kept = same_inputs(model, stages, {"input_ids": np.array([[3, 1, 4, 1, 5]])})
    # Before each gate: its input, and the residual stream that its norm also reads.
    assert [len(held) for held in kept[2:-2:2]] == [2] * 5
    assert max(map(len, kept)) <= 3


@pytest.mark.parametrize("export", ["optimum llama", "optimum phi3", "dynamo llama", "genai"])
def test_constants_are_not_carried(export: str) -> None:
    """What is carried depends on an input of the graph; tables of cosines and shapes are computed anew."""
    model = model_io.load(EXPORTS[export][0]())
    stages = decoder_stages(model)
    segments = Segments(model, stages)
    fed = {value for value in model.graph.inputs if not value.is_initializer()}
    for n in model.graph:
        if fed & {value for value in n.inputs if value is not None}:
            fed |= set(n.outputs)
    names = {value.name for value in fed}
    for number in range(len(stages)):
        segment = segments.segment(number)
        assert names.issuperset(segment.outputs)
        assert names.issuperset(segment.inputs)
        assert not set(segment.inputs) & set(segment.outputs)


def test_a_segment_holds_only_its_own_weights(llama_optimum: Path) -> None:
    model = model_io.load(llama_optimum)
    stages = decoder_stages(model)
    weights = {linear.weight.value.name: k for k, stage in enumerate(stages) for linear in stage.linears}
    segments = Segments(model, stages)
    assert len(segments) == len(stages)
    for number in range(len(stages)):
        graph = segments.segment(number).model.graph
        assert {weights[name] for name in graph.initializers if name in weights} == ({number - 1} if number else set())


@pytest.mark.parametrize("spelling", hand_decoder.SPELLINGS)
def test_every_spelling_of_a_linear(spelling: str, tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path, hand_decoder.Spec(linear=spelling, mlps=2)))
    stages = decoder_stages(model)
    # Gemm's operands are reshaped, and transA's transposed, for each Linear anew.
    assert sum(len(stage.linears) for stage in stages) == 3 + 1 + 2 * 3
    same_inputs(model, stages, {"input_ids": np.array([[3, 1, 4, 1, 5]])})


def parallel_block(layers: int = 2) -> onnx.ModelProto:
    """x + attention-like(x) + mlp(x): branches that do not wait for each other."""
    rng, width = np.random.default_rng(0), graphs.IN
    nodes, constants, x = [], {}, "x"
    for i in range(layers):
        for name in ("v", "o", "up", "down"):
            constants[f"{name}{i}"] = rng.standard_normal((width, width)).astype(np.float32) / 4
        nodes += [
            node("Tanh", [x], [f"n{i}"]),
            node("MatMul", [f"n{i}", f"v{i}"], [f"value{i}"], name=f"v{i}"),
            node("Sigmoid", [f"value{i}"], [f"context{i}"]),
            node("MatMul", [f"context{i}", f"o{i}"], [f"a{i}"], name=f"o{i}"),
            node("MatMul", [f"n{i}", f"up{i}"], [f"u{i}"], name=f"up{i}"),
            node("Relu", [f"u{i}"], [f"act{i}"]),
            node("MatMul", [f"act{i}", f"down{i}"], [f"d{i}"], name=f"down{i}"),
            node("Add", [f"a{i}", f"d{i}"], [f"both{i}"]),
            node("Add", [x, f"both{i}"], [f"x{i}"]),
        ]
        x = f"x{i}"
    return graphs.model(nodes, {"x": ["b", "s", width]}, {x: ["b", "s", width]}, constants)


def test_parallel_branches(tmp_path: Path) -> None:
    """In the last block nothing needs attention's output once the MLP's input is there."""
    onnx.save(parallel_block(), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    stages = plain_stages(model)
    names = [[linear.name for linear in stage.linears] for stage in stages]
    assert names == [["v0", "up0"], ["o0"], ["down0"], ["v1", "up1"], ["o1"], ["down1"]]
    x = np.random.default_rng(1).standard_normal((1, 5, graphs.IN)).astype(np.float32)
    same_inputs(model, stages, {"x": x})
    last = Segments(model, stages).segment(5)
    assert last.nodes == (None,)
    assert all(copy is not None for number in range(1, 5) for copy in Segments(model, stages).segment(number).nodes)


def branching() -> onnx.ModelProto:
    """A subgraph that reads a value of the stage before, a constant and a carried one from outside."""
    width = graphs.IN
    rng = np.random.default_rng(0)
    constants = {f"W{i}": rng.standard_normal((width, width)).astype(np.float32) / 4 for i in range(3)}
    constants |= {"limit": np.array(0, np.float32), "half": np.full(width, 0.5, np.float32)}
    inner = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("rejected", TensorProto.FLOAT, None)
    yes = helper.make_graph(
        [node("Mul", ["r", "half"], ["m"]), node("Add", ["m", "x"], ["chosen"])], "yes", [], [inner]
    )
    no = helper.make_graph([node("Sub", ["r", "x"], ["rejected"])], "no", [], [other])
    nodes = [
        node("MatMul", ["x", "W0"], ["p"], name="first"),
        node("Relu", ["p"], ["r"]),
        node("ReduceSum", ["r"], ["sum"], keepdims=0),
        node("Greater", ["sum", "limit"], ["positive"]),
        node("If", ["positive"], ["branch"], then_branch=yes, else_branch=no),
        node("MatMul", ["branch", "W1"], ["q"], name="second"),
        node("Add", ["q", "r"], ["s"]),
        node("MatMul", ["s", "W2"], ["y"], name="third"),
    ]
    return graphs.model(nodes, {"x": ["b", "s", width]}, {"y": ["b", "s", width]}, constants)


def test_subgraphs_read_what_is_outside_of_them(tmp_path: Path) -> None:
    onnx.save(branching(), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    stages = plain_stages(model)
    assert len(stages) == 3
    x = np.random.default_rng(1).standard_normal((1, 5, graphs.IN)).astype(np.float32)
    for feeds in ({"x": x}, {"x": np.zeros_like(x)}):  # both branches
        kept = same_inputs(model, stages, feeds)
        assert kept[1] == {"r", "branch"}
    assert "half" in Segments(model, stages).segment(1).model.graph.initializers


def test_a_stage_may_read_an_input_of_the_graph(tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    stages = plain_stages(model)
    assert Segments(model, stages).segment(0).outputs == ()
    same_inputs(model, stages, {"x": np.ones((1, 3, graphs.IN), np.float32)})


def test_kinds_part_stages(llama_optimum: Path) -> None:
    model = model_io.load(llama_optimum)
    found = list(linears(model.graph))
    alone = {found[1].node}
    stages = find_stages(found, (), lambda linear: linear.node in alone)
    assert [len(stage.linears) for stage in stages[:3]] == [2, 1, 1]
    assert stages[0].input is stages[1].input
    same_inputs(model, stages, feeds_of(llama_optimum)[0])


def test_the_model_is_left_as_it_is(llama_optimum: Path) -> None:
    model = model_io.load(llama_optimum)
    before = ir.to_proto(model).SerializeToString()
    segments = Segments(model, decoder_stages(model))
    for number in range(len(segments)):
        segments.segment(number)
    assert ir.to_proto(model).SerializeToString() == before
