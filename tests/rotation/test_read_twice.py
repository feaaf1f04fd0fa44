"""What one node reads twice, or another one, too, and Casts that change what is held: rotated once, or left alone."""

from collections.abc import Callable
from pathlib import Path

import hand_decoder
import numpy as np
import onnx
import pytest
from hand_decoder import HEADS, HIDDEN, Spec
from onnx import TensorProto, helper, numpy_helper
from rotating import check_equivalent, rotate

Change = Callable[[onnx.GraphProto], None]


def node_of(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.output[0] == output)


def before(graph: onnx.GraphProto, node: onnx.NodeProto, *made: onnx.NodeProto) -> None:
    at = list(graph.node).index(node)
    for new in reversed(made):
        graph.node.insert(at, new)


def changed(spec: Spec, change: Change, folder: Path) -> Path:
    model = hand_decoder.build(spec)
    change(model.graph)
    path = folder / "source" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    return path


def added_to_itself(graph: onnx.GraphProto) -> None:
    add = node_of(graph, "x2")
    before(graph, add, helper.make_node("Add", ["mlp0_down_out"] * 2, ["doubled"], name="doubled"))
    add.input[0] = "doubled"


def summed_twice(graph: onnx.GraphProto) -> None:
    add = node_of(graph, "x2")
    add.op_type, add.input[:] = "Sum", ["mlp0_down_out", "x1", "mlp0_down_out"]


def rows_added_to_themselves(graph: onnx.GraphProto) -> None:
    """Of a second table, on the stream."""
    table = np.random.default_rng(1).standard_normal((hand_decoder.VOCAB, HIDDEN)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(table, "second"))
    add = node_of(graph, "x1")
    before(
        graph,
        add,
        helper.make_node("Gather", ["second", "input_ids"], ["more"], name="more"),
        helper.make_node("Add", ["more", "more"], ["more_twice"], name="more_twice"),
        helper.make_node("Add", ["embedded", "more_twice"], ["both"], name="both"),
    )
    add.input[0] = "both"


@pytest.mark.parametrize("change", [added_to_itself, summed_twice, rows_added_to_themselves])
def test_what_is_added_twice_is_rotated_once(change: Change, tmp_path: Path) -> None:
    source = changed(Spec(), change, tmp_path)
    target, _, plan = rotate(source, tmp_path)
    assert plan.counts == {"R1": 3, "R2": 1, "R3": 1, "R4": 1}
    check_equivalent(source, target)


@pytest.mark.parametrize("attention", ["gqa", "mha"])
@pytest.mark.parametrize(("key", "value"), [("k_out", "k_out"), ("v_out", "v_out")], ids=["K is V", "V is K"])
def test_keys_that_are_values(attention: str, key: str, value: str, tmp_path: Path) -> None:
    """What R2 and R3 do to one they would do to the other."""

    def change(graph: onnx.GraphProto) -> None:
        node_of(graph, "context").input[1], node_of(graph, "context").input[2] = key, value

    source = changed(Spec(attention=attention), change, tmp_path)
    target, sites, plan = rotate(source, tmp_path)
    assert {"R2", "R3"}.isdisjoint(plan.counts)
    assert all("as another operand, too" in left.reason for left in sites.left_out)
    check_equivalent(source, target)


@pytest.mark.parametrize(("keys", "kv_heads"), [(12, 4), (8, 4), (24, 2), (6, 2)])
def test_heads_of_keys_longer_or_shorter_than_those_of_values(keys: int, kv_heads: int, tmp_path: Path) -> None:
    """Packed, they look like heads of the values' length wherever the product can be divided by it."""
    rng = np.random.default_rng(5)

    def change(graph: onnx.GraphProto) -> None:
        widths = {"q": HEADS * keys, "k": kv_heads * keys, "v": kv_heads * 16}
        shapes = {f"W_{part}": (HIDDEN, width) for part, width in widths.items()} | {"W_o": (HEADS * 16, HIDDEN)}
        for initializer in graph.initializer:
            if initializer.name in shapes:
                shape = shapes[initializer.name]
                array = (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)
                initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
        for attribute in node_of(graph, "context").attribute:
            if attribute.name == "kv_num_heads":
                attribute.i = kv_heads

    source = changed(Spec(), change, tmp_path)
    target, sites, plan = rotate(source, tmp_path)
    assert plan.counts == {"R1": 3, "R2": 1, "R4": 1}
    assert [left.reason for left in sites.left_out] == [f"heads of Q and K have {keys} entries and those of V 16"]
    check_equivalent(source, target)


@pytest.mark.parametrize("norm", ["pow div", "mul reciprocal", "pow -0.5"])
def test_squares_that_others_read_are_no_part_of_a_norm(norm: str, tmp_path: Path) -> None:
    """They change with the stream, and only their mean does not."""

    def change(graph: onnx.GraphProto) -> None:
        add = node_of(graph, "x1")
        before(graph, add, helper.make_node("MatMul", ["n0_square", "W_squares"], ["squares"], name="squares"))
        weight = np.random.default_rng(2).standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, "W_squares"))
        before(graph, add, helper.make_node("Add", ["o_out", "squares"], ["o_more"], name="o_more"))
        add.input[1] = "o_more"

    source = changed(Spec(norm=norm), change, tmp_path)
    target, _, plan = rotate(source, tmp_path)
    assert "R1" not in plan.counts
    check_equivalent(source, target)


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.FLOAT8E4M3FN], ids=["integers", "fp8"])
@pytest.mark.parametrize("what", ["weight", "activation"])
def test_casts_that_round_are_not_looked_through(kind: int, what: str, tmp_path: Path) -> None:
    """A weight that is cut off to integers is not what is stored; neither is what goes to a norm."""
    name, reader = ("W_q", "q_out") if what == "weight" else ("v_out", "context")

    def change(graph: onnx.GraphProto) -> None:
        node = node_of(graph, reader)
        cut = helper.make_node("Cast", [name], ["cut"], name="cut", to=kind)
        before(graph, node, cut, helper.make_node("Cast", ["cut"], ["wide"], name="wide", to=TensorProto.FLOAT))
        node.input[list(node.input).index(name)] = "wide"

    source = changed(Spec(), change, tmp_path)
    target, _, plan = rotate(source, tmp_path)
    assert ("R1" if what == "weight" else "R2") not in plan.counts
    check_equivalent(source, target)
