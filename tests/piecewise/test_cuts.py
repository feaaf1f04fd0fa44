"""Pieces one after the other are the whole model, to the last digit, in every exporter's spelling."""

import logging
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.errors import FeedError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise import sweep
from quarot_onnx.piecewise.cuts import Cuts, Wanted
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import ByPieces, Whole, opened
from quarot_onnx.piecewise.sweep import Carried, Run
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.skeleton import open_augmented

SMALL = Memory(320_000, by_stages=True)  # pieces of 40 kB: about one Linear of the tiny models
node, value = helper.make_node, helper.make_tensor_value_info


def token_runs(model: ir.Model, folder: Path) -> list[Run]:
    """Two prefills, and where the graph has a cache a decode step on the second one's."""
    inputs = ModelInputs.from_model(model, folder=folder)
    rng = np.random.default_rng(0)
    feeds = [inputs.feed(rng.integers(0, 250, (1, length))) for length in (17, 9)]
    if not inputs.has_cache:
        return [Run(feed) for feed in feeds]
    step = inputs.feed(rng.integers(0, 250, (1, 1)), {name: feeds[1][name] for name, _ in inputs.presents}, 9)
    carried = inputs.carried(step)
    fed = {name: array for name, array in step.items() if name not in carried}
    presents = tuple(present for _, present in inputs.presents)
    return [Run(feeds[0]), Run(feeds[1], keeps=presents), Run(fed, carried)]


@pytest.mark.parametrize("export", exports.EXPORTS)
def test_pieces_compute_what_the_whole_does(export: str) -> None:
    path = exports.EXPORTS[export]()
    model = model_io.load(path)
    names = [str(output.name) for output in model.graph.outputs]
    runs = token_runs(model, path.parent)
    whole = list(Whole(runtime.session(path, low_memory=True)).outputs(runs, names))
    parts = list(opened(path, SMALL, low_memory=True).outputs(runs, names))
    assert len(Cuts(model, Wanted(names), SMALL.piece)) > 6
    for one, other in zip(whole, parts, strict=True):
        for expected, found in zip(one, other, strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_a_model_is_cut_once_for_what_it_is_run_for(monkeypatch: pytest.MonkeyPatch) -> None:
    path = exports.EXPORTS["optimum fp16"]()
    model = model_io.load(path)
    names, runs, made = [str(output.name) for output in model.graph.outputs], token_runs(model, path.parent), []
    monkeypatch.setattr(sweep, "Cuts", lambda *arguments: made.append(arguments) or Cuts(*arguments))
    parts = opened(path, SMALL, low_memory=True)
    for wanted, given in ((names, runs[:2]), (names, runs[:1]), (names[:1], runs[:1]), (names, runs), (names, runs)):
        whole = Whole(runtime.session(path, low_memory=True)).outputs(given, wanted)
        for one, other in zip(whole, parts.outputs(given, wanted), strict=True):
            for expected, found in zip(one, other, strict=True):
                np.testing.assert_array_equal(found, expected)
    assert len(made) == 3


def test_one_piece_is_open_at_a_time_and_none_is_larger_than_was_asked() -> None:
    path = exports.genai_like(tied_transposed=False)
    model, opened_pieces = model_io.load(path), []
    largest = max(tensor.nbytes for v in model.graph.initializers.values() if (tensor := v.const_value) is not None)
    alive = [0]

    class Session:
        def __init__(self, piece: ir.Model) -> None:
            tensors = [v.const_value for v in piece.graph.initializers.values() if v.const_value is not None]
            opened_pieces.append(sum(tensor.nbytes for tensor in tensors if len(tensor.shape) > 1))
            self._session = open_augmented(piece)
            alive[0] += 1
            assert alive[0] == 1

        def __del__(self) -> None:
            alive[0] -= 1

        def run(self, names: Any, feeds: Any) -> list[Any]:
            return list(self._session.run(names, feeds))

    list(ByPieces(model, SMALL, Session).outputs(token_runs(model, path.parent), ["logits"]))
    assert len(opened_pieces) > 6
    assert max(opened_pieces) <= max(SMALL.piece, largest)


def test_what_a_run_does_not_want_is_not_given(tmp_path: Path) -> None:
    path = exports.genai_like(tied_transposed=False)
    model = model_io.load(path)
    skipped = "present.0.key"
    runs = [Run(run.feeds, run.carried, run.keeps, frozenset({skipped})) for run in token_runs(model, path.parent)]
    for memory in (SMALL, Memory(by_stages=False)):
        found = list(opened(path, memory).outputs(runs, ["logits", skipped]))
        assert [(logits is None, cache is None) for logits, cache in found] == [(False, True)] * 3


def chain(folder: Path, *, early: bool = False) -> Path:
    """Two Linears with a cache that the second one makes; with ``early`` its past is read before the first."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((8, 8)).astype(np.float32) for _ in range(2)]
    read = "x" if early else "first"
    nodes = [
        node("Concat", ["past", read], ["joined"], axis=0) if early else node("MatMul", ["x", "w0"], ["first"]),
        node("MatMul", ["x", "w0"], ["first"]) if early else node("Concat", ["past", read], ["joined"], axis=0),
        node("ReduceSum", ["joined"], ["total"], keepdims=0),
        node("Add", ["first", "total"], ["sum"]),
        node("MatMul", ["sum", "w1"], ["y"]),
        node("Identity", ["y"], ["present"]),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", TensorProto.FLOAT, ["n", 8]), value("past", TensorProto.FLOAT, ["p", 8])],
        [value("y", TensorProto.FLOAT, ["n", 8]), value("present", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


CHAINED = [
    Run({"x": np.ones((2, 8), np.float32), "past": np.zeros((0, 8), np.float32)}, keeps=("present",)),
    Run({"x": np.full((1, 8), 2, np.float32)}, {"past": Carried("present", np.dtype(np.float32))}),
]


@pytest.mark.parametrize("early", [False, True])
def test_a_cache_is_not_read_before_it_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture, early: bool) -> None:
    path, memory = chain(tmp_path, early=early), Memory(8 * 256, by_stages=True)
    with caplog.at_level(logging.INFO, "quarot_onnx"):
        found = list(opened(path, memory).outputs(CHAINED, ["y"]))
    expected = list(opened(path, Memory(by_stages=False)).outputs(CHAINED, ["y"]))
    for (one,), (other,) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    # The past is read at once, the cache made by the last node: no piece can end between the two.
    assert ("run whole" in caplog.text) == early


def test_nothing_parts_a_value_from_its_rounding() -> None:
    """Between a QuantizeLinear and the product that reads it through a DequantizeLinear there is no place."""
    q, dq = ["s", "z"], "DequantizeLinear"
    nodes = [node("MatMul", ["x", "w0"], ["first"])]
    nodes += [node("QuantizeLinear", ["first", *q], ["q"]), node(dq, ["q", *q], ["d"]), node(dq, ["w1", "s"], ["v"])]
    nodes += [node("MatMul", ["d", "v"], ["y"])]
    rng = np.random.default_rng(0)
    arrays = {
        "w0": rng.standard_normal((8, 8)).astype(np.float32),
        "w1": rng.integers(-9, 9, (8, 8)).astype(np.int8),
        "s": np.float32(0.1),
        "z": np.uint8(3),
    }
    info = [value("x", TensorProto.FLOAT, ["n", 8])], [value("y", TensorProto.FLOAT, ["n", 8])]
    graph = helper.make_graph(nodes, "g", *info, [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    for limit in range(1, 400, 50):
        [first, *rest] = Cuts(model, Wanted(["y"]), limit)
        assert [first.outputs, *(piece.inputs for piece in rest)] in ([("first",), ("first",)], [("y",)])
    assert len(Cuts(model, Wanted(["y"]), 1)) == 2


def test_a_run_that_fails_is_told_as_it_was_given() -> None:
    path = exports.optimum_export("llama")
    runs = token_runs(model_io.load(path), path.parent)
    wrong = Run({**runs[0].feeds, "attention_mask": np.ones((1, 5), np.int64)})
    said = []
    for memory in (Memory(by_stages=False), SMALL):
        with pytest.raises(FeedError, match=r"on input_ids \[1, 17\], attention_mask \[1, 5\]") as caught:
            list(opened(path, memory).outputs([runs[0], wrong], ["logits"]))
        said.append(str(caught.value))
    assert all("onnxruntime cannot run the model" in words for words in said)
