from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_decoders as tiny
from onnx import helper, numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.sessions import skeleton
from quarot_onnx.sessions.skeleton import open_augmented

VOCAB = 512  # makes E and Wh 16 kB each: large enough to stay external


def logits(model: ir.Model) -> np.ndarray:
    inputs = ModelInputs.from_model(model)
    return open_augmented(model, threads=1).run([inputs.logits], inputs.feed(np.arange(6)[None]))[0]


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(tiny.build(tiny.Spec(vocab=VOCAB)))


@pytest.mark.parametrize("external", [False, True])
def test_weights_stay_in_their_file(tmp_path, model, external: bool):
    path = tiny.save(tiny.build(tiny.Spec(vocab=VOCAB)), tmp_path, external=external)
    loaded = model_io.load(path)
    skeleton_bytes, folder = skeleton._serialize(loaded)
    assert folder == tmp_path
    assert len(skeleton_bytes) < 16_000 < path.stat().st_size + 16_000 * external
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_data_behind_a_link(tmp_path, model):
    tiny.save(tiny.build(tiny.Spec(vocab=VOCAB)), tmp_path / "blobs", external=True)
    (tmp_path / "snapshot").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    np.testing.assert_array_equal(logits(model_io.load(tmp_path / "snapshot" / "model.onnx")), logits(model))


def test_data_in_two_files(tmp_path, model):
    for name, folder in (("E", "one"), ("Wh", "two")):
        (tmp_path / folder).mkdir()
        value = model.graph.initializers[name]
        array = value.const_value.numpy()
        array.tofile(tmp_path / folder / "data")
        place = str(tmp_path / folder / "data")
        value.const_value = ir.ExternalTensor(
            place, 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name
        )
    plain = ir.from_proto(tiny.build(tiny.Spec(vocab=VOCAB)))
    np.testing.assert_array_equal(logits(model), logits(plain))


@pytest.mark.parametrize("condition", [True, False])
def test_tensors_of_one_name_in_two_branches(tmp_path: Path, condition: bool) -> None:
    """Names hold within a graph: those of the branches of an If may be the same."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Mul", ["x", "c"], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, [4])],
            [numpy_helper.from_array(np.full(4, factor, np.float32), "c")],
        )

    graph = helper.make_graph(
        [helper.make_node("If", ["which"], ["y"], then_branch=branch("a", 1.0), else_branch=branch("b", 100.0))],
        "branches",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4]),
            helper.make_tensor_value_info("which", onnx.TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="model.data")
    found = open_augmented(model_io.load(path)).run(None, {"x": np.ones(4, np.float32), "which": np.array(condition)})
    np.testing.assert_array_equal(found[0], np.full(4, 1.0 if condition else 100.0))


def test_tensors_that_lie_in_others(tmp_path: Path) -> None:
    """A small one is told from a large one, or another small one, that begins where it does; one may hold nothing."""
    x, w, column = (
        np.random.default_rng(seed).random(shape, np.float32) for seed, shape in enumerate(((2, 16), (16, 32), 32))
    )
    (tmp_path / "model.data").write_bytes(w.tobytes() + column.tobytes())

    def lying(name: str, dims: list[int], offset: int, length: int) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=1, dims=dims, data_location=1)
        for key, value in (("location", "model.data"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    steps = [
        helper.make_node("Concat", ["x", "nothing"], ["rows"], axis=0),
        helper.make_node("MatMul", ["rows", "w"], ["a"]),
        helper.make_node("Mul", ["a", "row"], ["b"]),
        helper.make_node("Add", ["b", "column"], ["c"]),
        helper.make_node("Add", ["c", "first"], ["y"]),
    ]
    tensors = [
        lying("w", [16, 32], 0, 2048),
        lying("nothing", [0, 16], 0, 0),
        lying("row", [32], 0, 128),
        lying("column", [32], 2048, 128),
        lying("first", [1], 2048, 4),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(steps, "views", ends[:1], ends[1:], tensors)
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    (found,) = open_augmented(model_io.load(path)).run(None, {"x": x})
    np.testing.assert_allclose(found, x @ w * w[0] + column + column[0], rtol=1e-5)


def test_a_small_tensor_of_4_bits(tmp_path: Path) -> None:
    packed = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT4, dims=[4], data_location=1)
    for key, value in (("location", "model.data"), ("offset", "0"), ("length", "2")):
        packed.external_data.add(key=key, value=value)
    (tmp_path / "model.data").write_bytes(bytes([0x21, 0xF3]))
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    one = numpy_helper.from_array(np.float32(1), "one")
    graph = helper.make_graph([helper.make_node("DequantizeLinear", ["w", "one"], ["y"])], "g", [], [y], [packed, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (found,) = open_augmented(model_io.load(tmp_path / "model.onnx")).run(None, {})
    assert found.tolist() == [1, 2, 3, -1]


def test_large_weights_in_memory_are_refused(model, monkeypatch):
    monkeypatch.setattr(skeleton, "_MAX_INLINE", 1000)
    with pytest.raises(ModelError, match="are in memory: save the model"):
        open_augmented(model)


def test_a_graph_that_onnxruntime_refuses(model):
    model.graph[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match="NoSuchOp"):
        open_augmented(model)
