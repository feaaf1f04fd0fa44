"""The wire walk against protobuf itself."""

import io_models
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.io import wire


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.sampled_from([0, 1, 255, 256, 257, 4095, 4096, 40_000]), min_size=1, max_size=6))
def test_skeleton_points_at_the_very_bytes_of_each_large_tensor(tmp_path, sizes):
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)}
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = io_models.model_of([helper.make_node("Identity", ["x"], ["y"])], tensors)
    path = tmp_path / "m.onnx"
    whole = model.SerializeToString()
    path.write_bytes(whole)
    proto = onnx.ModelProto.FromString(wire.skeleton(path))
    for tensor in proto.graph.initializer:
        array = arrays[tensor.name]
        if array.nbytes < wire.INLINE_BYTES:
            assert tensor.raw_data == array.tobytes()
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(entries["offset"]), int(entries["length"])
        assert entries["location"] == "m.onnx"
        assert whole[start : start + length] == array.tobytes()
        assert not tensor.HasField("raw_data")
        tensor.raw_data = array.tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    assert proto == model


def test_skeleton_of_a_small_model_is_the_file(tmp_path):
    model = io_models.model_of([helper.make_node("Identity", ["x"], ["y"])], [])
    path = io_models.write(model, tmp_path / "m.onnx")
    assert wire.skeleton(path) == path.read_bytes()


def test_skeleton_takes_tensors_out_of_attributes_subgraphs_and_functions(tmp_path):
    tensor = numpy_helper.from_array(np.ones(1024, np.float32), "w")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([constant], "branch", [], [], [tensor])
    nodes = [constant, helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)]
    function = helper.make_function("local", "F", [], ["c"], [constant], io_models.OPSETS)
    path = io_models.write(io_models.model_of(nodes, [tensor], functions=[function]), tmp_path / "m.onnx")
    assert path.stat().st_size > 7 * 4096
    skeleton = wire.skeleton(path)
    assert len(skeleton) < 2048
    proto = onnx.ModelProto.FromString(skeleton)
    assert proto.functions[0].node[0].attribute[0].t.data_location == TensorProto.EXTERNAL


def test_inline_pieces_put_the_weights_back(tmp_path):
    model = io_models.linear_model()
    skeleton = onnx.ModelProto.FromString(model.SerializeToString())
    payloads = []
    for tensor in skeleton.graph.initializer[:2]:
        for key, value in {"location": "", "offset": len(payloads), "length": len(tensor.raw_data)}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensor.data_location = TensorProto.EXTERNAL
        payloads.append(tensor.raw_data)
        tensor.ClearField("raw_data")
    pieces = wire.inline_pieces(skeleton.SerializeToString())
    assert [piece for piece in pieces if isinstance(piece, wire.Payload)] == [
        wire.Payload(0, 4096),
        wire.Payload(1, 4096),
    ]
    joined = b"".join(payloads[piece.index] if isinstance(piece, wire.Payload) else piece for piece in pieces)
    assert sum(map(wire.piece_size, pieces)) == len(joined)
    assert onnx.ModelProto.FromString(joined) == model


def test_imported_domains(tmp_path):
    path = io_models.write(io_models.linear_model(), tmp_path / "m.onnx")
    assert wire.imported_domains(path) == {"", "com.microsoft"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05abc", "ends 2 bytes beyond"),
        (b"\x08", "has no end"),
        (b"\x08" + b"\xff" * 11, "has no end"),
        (b"\x0b", "no protobuf field starts at byte 0"),
        (b"\x02\x00", "no protobuf field starts at byte 0"),
        (b"\x09\x00", "ends 7 bytes beyond"),
        (b"\x0d\x00", "ends 3 bytes beyond"),
    ],
)
def test_fields_refuse_what_is_no_message(data, message):
    with pytest.raises(wire.WireError, match=message):
        list(wire.fields(data, 0, len(data)))


@given(st.binary(max_size=40))
def test_fields_of_any_bytes_tile_them_or_raise(data):
    try:
        found = list(wire.fields(data, 0, len(data)))
    except wire.WireError:
        return
    edges = [0, *(field.stop for field in found)]
    assert [field.start for field in found] == edges[:-1]
    assert edges[-1] == len(data)
