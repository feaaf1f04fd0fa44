"""A head that is larger than a piece is computed in panels of its columns, to the last digit."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.io import model_io
from quarot_onnx.piecewise.cuts import Cuts, Wanted
from quarot_onnx.piecewise.memory import Memory, opened_bytes
from quarot_onnx.piecewise.panels import heads, in_panels
from quarot_onnx.piecewise.runs import Whole, opened
from quarot_onnx.piecewise.sweep import Run
from quarot_onnx.sessions import runtime

HIDDEN, VOCAB = 320, 1100  # more terms than one block of onnxruntime's, and columns that are no multiple of a panel's
node = helper.make_node


def written(folder: Path, kind: type = np.float32, *, transposed: bool = False, out: str = "") -> Path:
    """A product, a Relu and a head; with weights of 16 bits, and with what stands behind the head."""
    rng, dtype = np.random.default_rng(0), helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    head = rng.standard_normal((HIDDEN, VOCAB)).astype(kind)
    weights = {
        "first": rng.standard_normal((HIDDEN, HIDDEN)).astype(kind),
        "head": np.ascontiguousarray(head.T) if transposed else head,
    }
    nodes = [node("MatMul", ["x", "first"], ["a"]), node("Relu", ["a"], ["h"])]
    nodes += [node("Transpose", ["head"], ["seen"], perm=[1, 0])] if transposed else []
    seen = "seen" if transposed else "head"
    if out:
        nodes += [node("MatMul", ["h", seen], ["made"])]
        nodes += [node(out, ["made"], ["logits"], **({"to": TensorProto.FLOAT} if out == "Cast" else {}))]
    else:
        nodes += [node("MatMul", ["h", seen], ["logits"])]
    last = TensorProto.FLOAT if out == "Cast" else dtype
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", dtype, ["batch", "tokens", HIDDEN])],
        [helper.make_tensor_value_info("logits", last, ["batch", "tokens", VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kind", "out"), [(np.float32, ""), (np.float16, ""), (np.float16, "Cast")])
@pytest.mark.parametrize("panels", [2, 3, 8])
def test_panels_are_the_whole(
    tmp_path: Path, kind: type, out: str, panels: int, *, transposed: bool, low_memory: bool
) -> None:
    path = written(tmp_path, kind, transposed=transposed, out=out)
    model = model_io.load(path)
    [head] = heads(model)
    bytes_of_all = HIDDEN * VOCAB * (4 if kind is np.float32 else 6)
    memory = Memory(8 * -(-bytes_of_all // panels), by_stages=True)
    assert len(head.panels(memory.piece)) == panels
    rng = np.random.default_rng(1)
    runs = [Run({"x": rng.standard_normal((1, tokens, HIDDEN)).astype(kind)}) for tokens in (1, 5, 67)]
    expected = list(Whole(runtime.session(path, low_memory=low_memory)).outputs(runs, ["logits"]))
    found = list(opened(path, memory, low_memory=low_memory).outputs(runs, ["logits"]))
    for [one], [other] in zip(expected, found, strict=True):
        assert other.dtype == one.dtype
        np.testing.assert_array_equal(other, one)


def test_no_piece_holds_more_than_a_panel(tmp_path: Path) -> None:
    model = model_io.load(written(tmp_path, np.float16))
    limit = HIDDEN * VOCAB * 6 // 4
    pieces = [piece.model for piece in Cuts(model, Wanted(["logits"]), limit)]
    assert max(map(opened_bytes, pieces[1:])) <= limit + HIDDEN * 128 * 6
    assert len(pieces) >= 4


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = model_io.load(written(tmp_path))
    before = ir.to_proto(model).SerializeToString()
    copy = in_panels(model, 400_000)
    assert copy is not model
    assert [value.name for value in copy.graph.outputs] == ["logits"]
    assert ir.to_proto(model).SerializeToString() == before
    assert in_panels(model, HIDDEN * VOCAB * 4) is model


@pytest.mark.parametrize("out", ["Relu", "Tanh"])
def test_what_is_changed_behind_its_product_is_no_head(tmp_path: Path, out: str) -> None:
    assert not heads(model_io.load(written(tmp_path, out=out)))


def test_what_is_looked_at_is_not_cut(tmp_path: Path) -> None:
    model = model_io.load(written(tmp_path, np.float16, out="Cast"))
    assert len(heads(model)) == 1
    assert len(heads(model, ["h"])) == 1
    assert not heads(model, ["made"])
    assert not heads(model, ["logits"])
