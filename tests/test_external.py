"""What ``load`` refuses: each refusal names the value, the place and the way out, in one line."""

from pathlib import Path

import io_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        model_io.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file_suggests_the_nearest(tmp_path):
    io_models.write(io_models.linear_model(), tmp_path / "model.onnx")
    assert "no model file 'modle.onnx'" in refusal(tmp_path / "modle.onnx")
    assert "did you mean 'model.onnx'?" in refusal(tmp_path / "modle.onnx")
    assert f"the folder {tmp_path / 'no'} does not exist" in refusal(tmp_path / "no" / "m.onnx")


def test_a_folder_names_the_model_in_it(tmp_path):
    assert "without an .onnx file" in refusal(tmp_path)
    only = io_models.write(io_models.linear_model(), tmp_path / "decoder.onnx")
    assert f"pass the model file {only}" in refusal(tmp_path)
    io_models.write(io_models.linear_model(), tmp_path / "encoder.onnx")
    assert "2 .onnx files (decoder.onnx, encoder.onnx)" in refusal(tmp_path)
    chosen = io_models.write(io_models.linear_model(), tmp_path / "model.onnx")
    assert f"pass the model file {chosen}" in refusal(tmp_path)


def test_a_folder_with_an_onnx_subfolder_names_the_model_in_it(tmp_path):
    (tmp_path / "onnx").mkdir()
    model = io_models.write(io_models.linear_model(), tmp_path / "onnx" / "model.onnx")
    assert f"pass the model file {model}" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"json": true}', b"\x00" * 2000, b"\xff" * 40, b"GGUF" + bytes(3000)])
def test_a_file_that_is_not_a_model(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert f"{path} ({len(content):,} bytes) is truncated, corrupt or not an ONNX model" in refusal(path)


def test_git_lfs_pointers_are_recognised(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "m.onnx").write_bytes(pointer)
    assert "git lfs pull" in refusal(tmp_path / "m.onnx")
    source = io_models.write(io_models.linear_model(), tmp_path / "n.onnx", data="weights.bin")
    (tmp_path / "weights.bin").write_bytes(pointer)
    assert "git lfs pull" in refusal(source)


def test_missing_data_file_is_named_with_where_it_was_looked_for(tmp_path):
    source = io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data="weights.bin")
    (tmp_path / "weights.bin").unlink()
    message = refusal(source)
    assert "'weights.bin'" in message
    assert "'first'" in message
    assert f"looked in {tmp_path}" in message


def test_short_data_file_names_tensor_needed_and_available_bytes(tmp_path):
    source = io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data="weights.bin")
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-100])
    message = refusal(source)
    assert f"{data} is too short: tensor 'second' needs 4,096 bytes at offset" in message
    assert "3,996 are there" in message


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin", "/etc/passwd", "C:\\weights.bin"])
def test_data_outside_the_model_folder_are_refused(tmp_path, location):
    (tmp_path / "weights.bin").write_bytes(bytes(8192))
    (tmp_path / "model").mkdir()
    source = external(tmp_path / "model" / "m.onnx", location=location)
    assert repr(location) in refusal(source)
    assert "outside the model folder" in refusal(source)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "w", "length": "4095"}, "needs 4,096 bytes, the file has 4,095"),
        ({"location": "w", "offset": "-4"}, "too short"),
        ({"location": "w", "offset": "1"}, "4,095 are there"),
        ({"location": "w", "offset": "x"}, "no valid external data range"),
        ({}, "names no data file"),
    ],
)
def test_impossible_ranges_are_refused(tmp_path, entries, expected):
    (tmp_path / "w").write_bytes(bytes(4096))
    assert expected in refusal(external(tmp_path / "m.onnx", **entries))


def test_offset_and_length_may_be_left_out(tmp_path):
    w = io_models.weights()["first"]
    (tmp_path / "w").write_bytes(w.tobytes())
    model = model_io.load(external(tmp_path / "m.onnx", location="w"))
    np.testing.assert_array_equal(model_io.read_array(model.graph.initializers["first"].const_value), w)


@pytest.mark.parametrize("entries", [{"length": "0"}, {"offset": "64"}, {"offset": "64", "length": "0"}])
def test_a_length_of_zero_or_none_means_what_the_shape_needs(tmp_path, entries):
    w = io_models.weights()["first"]
    (tmp_path / "w").write_bytes(bytes(int(entries.get("offset", 0))) + w.tobytes() + bytes(100))
    source = external(tmp_path / "m.onnx", location="w", **entries)
    model = model_io.load(source)
    np.testing.assert_array_equal(model_io.read_array(model.graph.initializers["first"].const_value), w)
    saved = model_io.save(model, tmp_path / "out.onnx")
    x = np.ones((2, 32), np.float32)
    ours, theirs = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for path in (saved.path, source)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_length_of_zero_beyond_the_end_of_the_file(tmp_path):
    (tmp_path / "w").write_bytes(bytes(4000))
    assert "needs 4,096 bytes at offset 0, 4,000 are there" in refusal(
        external(tmp_path / "m.onnx", location="w", length="0")
    )


def test_an_empty_tensor_in_an_empty_file(tmp_path):
    (tmp_path / "w").write_bytes(b"")
    tensor = TensorProto(name="none", data_type=TensorProto.FLOAT, dims=[0, 32])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    node = helper.make_node("Concat", ["x", "none"], ["y"], axis=0)
    (tmp_path / "m.onnx").write_bytes(io_models.model_of([node], [tensor]).SerializeToString())
    saved = model_io.save(model_io.load(tmp_path / "m.onnx"), tmp_path / "out.onnx")
    session = ort.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((2, 32), np.float32)})[0].shape == (2, 32)


def external(path: Path, **entries: str) -> Path:
    """A model whose one weight ``first: [32, 32]`` is external with these entries."""
    tensor = TensorProto(name="first", data_type=TensorProto.FLOAT, dims=[32, 32])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "first"], ["y"])
    path.write_bytes(io_models.model_of([node], [tensor]).SerializeToString())
    return path


def test_inline_data_of_the_wrong_length_are_refused(tmp_path):
    for size in (32, 1024):
        tensor = numpy_helper.from_array(np.ones(size, np.float32), "first")
        tensor.dims[:] = [size + 1]
        node = helper.make_node("Add", ["x", "first"], ["y"])
        source = io_models.write(io_models.model_of([node], [tensor]), tmp_path / "m.onnx")
        assert f"'first' in {source}: shape [{size + 1}] needs {4 * size + 4:,} bytes" in refusal(source)


@pytest.mark.parametrize(("dims", "data_type"), [([-32, -32], TensorProto.FLOAT), ([32, 32], 0), ([32, 32], 99)])
def test_impossible_shapes_and_types_are_refused(tmp_path, dims, data_type):
    tensor = TensorProto(name="first", data_type=data_type, dims=dims, raw_data=bytes(4096))
    node = helper.make_node("Add", ["x", "first"], ["y"])
    path = tmp_path / "m.onnx"
    path.write_bytes(io_models.model_of([node], [tensor]).SerializeToString())
    assert "'first'" in refusal(path)


def test_a_graph_without_nodes_or_with_sparse_weights_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(io_models.model_of([], []).SerializeToString())
    assert "has no nodes" in refusal(path)
    proto = io_models.linear_model()
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=indices, dims=[4]))
    path.write_bytes(proto.SerializeToString())
    assert "sparse initializers (such as 'sparse')" in refusal(path)
    held = onnx.SparseTensorProto(values=values, indices=indices, dims=[4])
    constant = helper.make_node("Constant", [], ["held"], sparse_value=held)
    path.write_bytes(
        io_models.model_of([constant, helper.make_node("Add", ["x", "held"], ["y"])], []).SerializeToString()
    )
    assert "has sparse constants; export it with dense weights" in refusal(path)


def test_a_value_produced_twice_is_refused(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    path = tmp_path / "m.onnx"
    path.write_bytes(io_models.model_of([node, node], []).SerializeToString())
    assert "inconsistent" in refusal(path)


def test_a_path_that_is_not_utf8(tmp_path):
    folder = tmp_path / "caf\udce9"  # the byte E9 in a name, as Python decodes it
    folder.mkdir()
    io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data="weights.bin")
    for name in ("m.onnx", "weights.bin"):
        (tmp_path / name).rename(folder / name)
    message = refusal(folder / "m.onnx")
    assert r"caf\udce9" in message
    assert "rename the folder" in message
