"""Weights of float16 go into pieces as the 32-bit floats that onnxruntime would make of them."""

from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.io import model_io
from quarot_onnx.piecewise import sweep as sweeping
from quarot_onnx.piecewise import wide
from quarot_onnx.piecewise.cuts import Cuts, Piece, Wanted
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Whole, opened
from quarot_onnx.piecewise.sweep import Run
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.providers import Provider, running_on

SMALL = Memory(320_000, by_stages=True)
node, value = helper.make_node, helper.make_tensor_value_info


def halves(piece: Piece) -> set[str]:
    """The matrices of float16 that a piece holds itself."""
    tensors = ((name, v.const_value) for name, v in piece.model.graph.initializers.items())
    return {name for name, t in tensors if t is not None and t.dtype == ir.DataType.FLOAT16 and len(t.shape) == 2}


def test_products_take_their_weights_from_outside() -> None:
    model = model_io.load(exports.genai_like(tied_transposed=False, dtype="fp16"))
    held, fed = set[str](), set[str]()
    for piece in Cuts(model, Wanted(["logits"], wide=True), SMALL.piece):
        held |= halves(piece)
        fed |= piece.weights.keys()
        assert not piece.weights.keys() & set(piece.inputs)
    products = {str(n.inputs[1].name) for n in model.graph if n.op_type == "MatMul" and n.inputs[1] is not None}
    assert {name.partition("/")[0] for name in fed} == products  # the head in panels
    assert held == {"model.embed_tokens.weight", "cos_cache", "sin_cache"}  # rows are taken of them


def test_nothing_is_taken_out_where_sessions_pack_weights() -> None:
    model = model_io.load(exports.genai_like(tied_transposed=False, dtype="fp16"))
    pieces = list(Cuts(model, Wanted(["logits"]), SMALL.piece))
    assert not any(piece.weights for piece in pieces)
    assert len(set.union(*map(halves, pieces))) > 5


def saved(folder: Path, kind: int, *, looked_up: bool = False) -> Path:
    """Two products with weights of some kind, the second one a table of rows, too."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((48, 48))
    weights = [numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name) for name in "wv"]
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "v"], ["b"])]
    nodes += [node("Gather", ["v", "ids"], ["rows"])] if looked_up else []
    nodes += [node("Add", ["b", "rows" if looked_up else "a"], ["y"])]
    ids = [value("ids", TensorProto.INT64, ["n"])] if looked_up else []
    ends = [value("x", kind, ["n", 48]), *ids], [value("y", kind, ["n", 48])]
    graph = helper.make_graph(nodes, "products", *ends, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "m.onnx")
    return folder / "m.onnx"


def test_what_is_more_than_a_factor_stays(tmp_path: Path) -> None:
    model = model_io.load(saved(tmp_path, TensorProto.FLOAT16, looked_up=True))
    [piece] = Cuts(model, Wanted(["y"], wide=True), 1 << 30)
    assert (set(piece.weights), halves(piece)) == ({"w/float32"}, {"v"})


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_other_kinds_stay(tmp_path: Path, kind: int) -> None:
    [piece] = Cuts(model_io.load(saved(tmp_path, kind)), Wanted(["y"], wide=True), 1 << 30)
    assert not piece.weights


def test_parts_of_a_weight_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, TensorProto.FLOAT16)
    tensor = model_io.load(path).graph.initializers["w"].const_value
    assert tensor is not None
    for part in (1 << 20, 7 * 48, 1):
        monkeypatch.setattr(wide, "_PART", part)
        for one in (tensor, ir.Tensor(tensor.numpy())):
            found = wide.read_wide(one)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, tensor.numpy().astype(np.float32))
    runs = [Run({"x": np.random.default_rng(1).standard_normal((n, 48)).astype(np.float16)}) for n in (1, 5)]
    expected = list(Whole(runtime.session(path, low_memory=True)).outputs(runs, ["y"]))
    in_pieces = list(opened(path, Memory(by_stages=True), low_memory=True).outputs(runs, ["y"]))
    for [one], [other] in zip(expected, in_pieces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_provider_gets_weights_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = saved(tmp_path, TensorProto.FLOAT16), list[bool]()

    class Noted(Cuts):
        def __init__(self, model: ir.Model, wanted: Wanted, limit: int) -> None:
            asked.append(wanted.wide)
            super().__init__(model, wanted, limit)

    monkeypatch.setattr(sweeping, "Cuts", Noted)
    run = [Run({"x": np.ones((1, 48), np.float16)})]
    for provider in (None, Provider("AzureExecutionProvider", {})):
        with running_on(provider):
            list(opened(path, Memory(by_stages=True), low_memory=True).outputs(run, ["y"]))
    list(opened(path, Memory(by_stages=True)).outputs(run, ["y"]))
    assert asked == [True, False, False]
