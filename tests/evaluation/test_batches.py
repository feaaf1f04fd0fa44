"""Proofs run several windows at once where the original takes them so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_decoders as tiny
from onnx import helper, numpy_helper

from quarot_onnx.errors import FeedError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.evaluation.proof_tokens import rows_at_once
from quarot_onnx.piecewise import runs


def changed(folder: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
    """The tiny decoder, which reads ``ids`` that nodes make of its input ids."""
    model = tiny.build()
    graph = model.graph
    graph.node[0].input[1] = "ids"
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    return tiny.save(model, folder)


def one_row_alone(folder: Path) -> Path:
    """It says that it takes any batch, and does not."""
    nodes = [
        helper.make_node("Squeeze", ["input_ids", "row"], ["squeezed"]),
        helper.make_node("Unsqueeze", ["squeezed", "row"], ["ids"]),
    ]
    return changed(folder, nodes, row=np.array([0]))


def first_row_for_all(folder: Path) -> Path:
    """It takes any batch, and computes all rows as the first one."""
    nodes = [
        helper.make_node("Slice", ["input_ids", "zero", "one", "zero"], ["row"]),
        helper.make_node("Shape", ["input_ids"], ["whole"]),
        helper.make_node("Expand", ["row", "whole"], ["ids"]),
    ]
    return changed(folder, nodes, zero=np.array([0]), one=np.array([1]))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the ids of every run."""
    found: list[tuple[int, ...]] = []
    kept = runs.Whole.outputs

    def outputs(self, given, names, failed=runs.not_run):
        def noted():
            for run in given:
                found.append(run.feeds["input_ids"].shape)
                yield run

        return kept(self, noted(), names, failed)

    monkeypatch.setattr(runs.Whole, "outputs", outputs)
    return found


def test_windows_of_one_length_go_together(tmp_path: Path, batches: list[tuple[int, ...]]) -> None:
    path = tiny.save(tiny.build(), tmp_path / "a")
    tiny.tokenizer().save(str(path.parent / "tokenizer.json"))
    found = compare(path, path)
    assert batches == 2 * [(4, 32), *[(4, 1)] * 2]
    assert (found.tokens, found.decode_steps) == (4 * 34, 8)


def test_each_alone_where_the_original_fails_on_several(tmp_path: Path, batches: list[tuple[int, ...]]) -> None:
    path = one_row_alone(tmp_path / "a")
    found = compare(path, path)
    assert found.passed
    assert batches == [(2, 32), *2 * 2 * [(1, 32), *[(1, 1)] * 2]]
    assert (found.tokens, found.decode_steps) == (2 * 34, 4)


def test_another_that_fails_on_several_is_told_of(tmp_path: Path) -> None:
    path = tiny.save(tiny.build(), tmp_path / "a")
    with pytest.raises(FeedError, match=r"input_ids \[2, 32\]"):
        compare(path, one_row_alone(tmp_path / "b"))


def test_rows_that_are_mixed_up_are_found(tmp_path: Path) -> None:
    path = tiny.save(tiny.build(), tmp_path / "a")
    other = first_row_for_all(tmp_path / "b")
    assert compare(path, other, random_tokens=32).passed  # one window
    assert not compare(path, other).passed


@pytest.mark.parametrize("first", [True, False])
def test_one_of_fixed_batch_beside_one_of_any(first: bool, tmp_path: Path, batches: list[tuple[int, ...]]) -> None:
    free, model = tiny.save(tiny.build(), tmp_path / "a"), tiny.build()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    pair = (tiny.save(model, tmp_path / "b"), free)
    assert compare(*(pair if first else pair[::-1])).passed
    assert batches == 2 * 2 * [(1, 32), *[(1, 1)] * 2]


def test_how_many_at_once() -> None:
    windows = [np.zeros((4, 68), np.int64)]
    assert rows_at_once(windows, 32_000) == 4
    assert rows_at_once(windows, 128_256) == 3
    assert rows_at_once(windows, 1_000_000) == 1
    assert rows_at_once(windows, None) == 1
