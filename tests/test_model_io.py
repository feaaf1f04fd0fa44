"""Reading and writing whole models: what goes in comes out, and memory stays at one weight."""

import subprocess
import sys
from pathlib import Path

import io_models
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.sessions.runtime import session

X = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)


def outputs(path: Path) -> np.ndarray:
    # Unoptimized, so that both files run the very same kernels and the comparison can be exact.
    return session(path, threads=1, optimize=False).run(None, {"x": X})[0]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("source_data", [None, "weights.bin"])
@pytest.mark.parametrize("external", [False, True])
def test_round_trip_keeps_every_weight_and_the_outputs(tmp_path, source_data, external):
    source = io_models.write(io_models.linear_model(), tmp_path / "in.onnx", data=source_data)
    before = io_models.tree(tmp_path)
    model = model_io.load(source)
    assert model_io.source_of(model) == source
    saved = model_io.save(model, tmp_path / "out" / "m.onnx", use_external_data=external)
    assert saved.path == tmp_path / "out" / "m.onnx"
    assert saved.data_path == (tmp_path / "out" / "m.onnx.data" if external else None)
    files = [saved.path] if saved.data_path is None else [saved.path, saved.data_path]
    assert saved.bytes_total == sum(file.stat().st_size for file in files)
    written, expected = arrays_of(saved.path), io_models.weights()
    assert list(written) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)
    np.testing.assert_array_equal(outputs(saved.path), outputs(source))
    after = io_models.tree(tmp_path)
    assert {name: after[name] for name in before} == before
    onnx.checker.check_model(str(saved.path))


def test_large_inline_weights_are_presented_as_external_and_small_ones_are_not(tmp_path):
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "m.onnx"))
    kinds = {name: type(value.const_value) for name, value in model.graph.initializers.items()}
    assert kinds["first"] is kinds["second"] is ir.ExternalTensor
    assert kinds["bias"] is not ir.ExternalTensor


def test_external_offsets_are_aligned_and_small_tensors_stay_inline(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.integers(0, 9, (1, 1025)).astype(np.int8),
        "page": rng.integers(0, 9, (1 << 20,)).astype(np.int8),
        "tail": rng.integers(0, 9, (5, 999)).astype(np.int8),
        "bias": np.ones(4, np.int8),
    }
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    source = model_from(nodes, arrays, tmp_path)
    saved = model_io.save(model_io.load(source), tmp_path / "o.onnx", use_external_data=True)
    entries = {}
    for tensor in onnx.load(saved.path, load_external_data=False).graph.initializer:
        entries[tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["bias"] == {}
    assert {entries[name]["location"] for name in ("odd", "page", "tail")} == {"o.onnx.data"}
    assert int(entries["odd"]["offset"]) == 0
    assert int(entries["page"]["offset"]) == 4096
    assert int(entries["tail"]["offset"]) == 4096 + (1 << 20)
    for name, array in arrays_of(saved.path).items():
        np.testing.assert_array_equal(array, arrays[name])


def model_from(nodes, arrays, folder: Path) -> Path:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return io_models.write(io_models.model_of(nodes, tensors), folder / "in.onnx")


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        (TensorProto.FLOAT16, np.arange(1024).reshape(32, 32).astype(np.float16)),
        (TensorProto.BFLOAT16, np.arange(1024).reshape(32, 32).astype(ml_dtypes.bfloat16)),
        (TensorProto.INT4, (np.arange(3 * 1023).reshape(3, 1023) % 16 - 8).astype(ml_dtypes.int4)),
        (TensorProto.UINT4, (np.arange(4096).reshape(64, 64) % 16).astype(ml_dtypes.uint4)),
        (TensorProto.INT64, np.arange(1024).reshape(32, 32)),
    ],
)
def test_round_trip_of_every_weight_type(tmp_path, dtype, array, external):
    tensor = numpy_helper.from_array(array, "w")
    assert tensor.data_type == dtype
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    source = io_models.write(io_models.model_of(nodes, [tensor]), tmp_path / "in.onnx")
    model = model_io.load(source)
    np.testing.assert_array_equal(model_io.read_array(model.graph.initializers["w"].const_value), array)
    saved = model_io.save(model, tmp_path / "out.onnx", use_external_data=external)
    np.testing.assert_array_equal(arrays_of(saved.path)["w"], array)


def test_large_constants_become_initializers_and_small_ones_stay(tmp_path):
    arrays = io_models.weights()
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(arrays["first"], "value")),
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(arrays["bias"], "value")),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    source = io_models.write(io_models.model_of(nodes, []), tmp_path / "in.onnx")
    model = model_io.load(source)
    assert list(model.graph.initializers) == ["w"]
    assert [node.op_type for node in model.graph] == ["Constant", "MatMul", "Add"]
    saved = model_io.save(model, tmp_path / "out.onnx", use_external_data=True)
    np.testing.assert_array_equal(arrays_of(saved.path)["w"], arrays["first"])
    np.testing.assert_array_equal(outputs(saved.path), outputs(source))


def test_a_large_constant_that_is_a_graph_output_stays_a_node(tmp_path):
    w = np.arange(1024, dtype=np.float32).reshape(32, 32)
    nodes = [helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(w, "value"))]
    source = io_models.write(io_models.model_of(nodes, []), tmp_path / "in.onnx")
    saved = model_io.save(model_io.load(source), tmp_path / "out.onnx", use_external_data=True)
    np.testing.assert_array_equal(outputs(saved.path), w)


def test_functions_are_inlined_with_their_weights(tmp_path):
    w = io_models.weights()["first"]
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w, "value")),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
    ]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("local", "Project", ["a"], ["b"], body, opset)
    nodes = [
        helper.make_node("Project", ["x"], ["h"], domain="local"),
        helper.make_node("Project", ["h"], ["y"], domain="local"),
    ]
    proto = io_models.model_of(nodes, [], functions=[function], opsets=[*opset, helper.make_opsetid("local", 1)])
    source = io_models.write(proto, tmp_path / "in.onnx")
    model = model_io.load(source)
    assert not model.functions
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul"]
    saved = model_io.save(model, tmp_path / "out.onnx", use_external_data=True)
    np.testing.assert_array_equal(outputs(saved.path), outputs(source))
    # Both calls hold one and the same tensor: it is written once.
    assert saved.data_path is not None
    assert saved.data_path.stat().st_size == w.nbytes


def test_weights_of_subgraphs_survive(tmp_path):
    w = numpy_helper.from_array(io_models.weights()["first"], "w")
    out = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["branch"])], "then", [], [out], [w])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["branch"])], "else", [], [out])
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.ones((), bool), "yes")),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    source = io_models.write(io_models.model_of(nodes, []), tmp_path / "in.onnx")
    for external in (False, True):
        saved = model_io.save(model_io.load(source), tmp_path / "out.onnx", use_external_data=external)
        np.testing.assert_array_equal(outputs(saved.path), outputs(source))


@pytest.mark.parametrize("external", [False, True])
def test_typed_data_fields_are_written_as_they_are(tmp_path, external):
    w = io_models.weights()["first"]
    tensor = helper.make_tensor("first", TensorProto.FLOAT, w.shape, w.reshape(-1).tolist())
    assert tensor.float_data
    nodes = [helper.make_node("MatMul", ["x", "first"], ["y"])]
    source = io_models.write(io_models.model_of(nodes, [tensor]), tmp_path / "in.onnx")
    saved = model_io.save(model_io.load(source), tmp_path / "out.onnx", use_external_data=external)
    np.testing.assert_array_equal(arrays_of(saved.path)["first"], w)


def test_string_tensors_stay_inline(tmp_path):
    words = [f"word {index}".encode() for index in range(500)]
    tensor = helper.make_tensor("words", TensorProto.STRING, [500], words)
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    source = io_models.write(io_models.model_of(nodes, [tensor]), tmp_path / "in.onnx")
    for external in (False, True):
        saved = model_io.save(model_io.load(source), tmp_path / "out.onnx", use_external_data=external)
        assert list(onnx.load(saved.path).graph.initializer[0].string_data) == words


def test_a_model_in_a_hub_cache_of_symbolic_links_opens(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    io_models.write(io_models.linear_model(), blobs / "m.onnx", data="weights.bin")
    (blobs / "m.onnx").rename(blobs / "0a1b")
    (blobs / "weights.bin").rename(blobs / "2c3d")
    (snapshot / "m.onnx").symlink_to(blobs / "0a1b")
    (snapshot / "weights.bin").symlink_to(blobs / "2c3d")
    model = model_io.load(snapshot / "m.onnx")
    assert model_io.source_of(model) == snapshot / "m.onnx"
    saved = model_io.save(model, tmp_path / "out.onnx", use_external_data=True)
    np.testing.assert_array_equal(arrays_of(saved.path)["first"], io_models.weights()["first"])


def test_a_link_to_a_model_elsewhere_and_a_hard_linked_data_file_open(tmp_path):
    (tmp_path / "real").mkdir()
    real = io_models.write(io_models.linear_model(), tmp_path / "real" / "m.onnx", data="weights.bin")
    (tmp_path / "second_name.bin").hardlink_to(real.with_name("weights.bin"))
    (tmp_path / "link.onnx").symlink_to(real)
    model = model_io.load(tmp_path / "link.onnx")
    first = model.graph.initializers["first"].const_value
    np.testing.assert_array_equal(model_io.read_array(first), io_models.weights()["first"])


@pytest.mark.parametrize("data", [None, "weights.bin"])
def test_relative_paths_survive_a_change_of_folder(tmp_path, monkeypatch, data):
    io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data=data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = model_io.load("m.onnx")
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = model.graph.initializers["first"].const_value
    np.testing.assert_array_equal(model_io.read_array(first), io_models.weights()["first"])


def test_saving_leaves_the_model_as_it_was_and_usable(tmp_path):
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "in.onnx"))
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    first = model_io.save(model, tmp_path / "a.onnx", use_external_data=True)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    second = model_io.save(model, tmp_path / "b.onnx", use_external_data=True)
    assert first.data_path is not None
    assert second.data_path is not None
    assert io_models.digest(first.data_path) == io_models.digest(second.data_path)


@pytest.mark.parametrize("external", [False, True])
def test_lazy_weights_are_evaluated_once_each_and_progress_is_told(tmp_path, external):
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "in.onnx"))
    calls: list[str] = []
    for name, value in model.graph.initializers.items():
        value.const_value = doubled(name, value.const_value, calls)
    steps: list[tuple[int, int]] = []
    saved = model_io.save(
        model, tmp_path / "out.onnx", use_external_data=external, progress=lambda done, all_: steps.append((done, all_))
    )
    assert sorted(calls) == ["bias", "first", "second"]
    assert steps == [(4096, 8192), (8192, 8192)]
    for name, array in io_models.weights().items():
        np.testing.assert_array_equal(arrays_of(saved.path)[name], 2 * array)


def doubled(name: str, tensor: ir.TensorProtocol, calls: list[str]) -> ir.TensorProtocol:
    def compute() -> np.ndarray:
        calls.append(name)
        return 2 * model_io.read_array(tensor)

    return model_io.lazy_tensor(compute, dtype=tensor.dtype, shape=tensor.shape.numpy(), name=name)


def test_weights_from_100_mb_on_get_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "_EXTERNAL_FROM", 8192)
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "in.onnx"))
    assert model_io.save(model, tmp_path / "a.onnx").data_path is not None
    monkeypatch.setattr(model_io, "_EXTERNAL_FROM", 8193)
    assert model_io.save(model, tmp_path / "b.onnx").data_path is None


def test_metadata_and_opsets_survive(tmp_path):
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "in.onnx"))
    model.metadata_props["quarot"] = "R1"
    saved = model_io.save(model, tmp_path / "out.onnx", report={"seed": 3})
    again = model_io.load(saved.path)
    assert again.metadata_props == {"quarot": "R1"}
    assert again.opset_imports == {"": 21, "com.microsoft": 1}
    assert saved.report_path == tmp_path / "out.quarot.json"
    assert saved.report_path.read_text() == '{\n  "seed": 3\n}\n'


@pytest.mark.parametrize("name", ["opset", "domain"])
def test_truncation_at_every_byte_is_a_model_error(tmp_path, name):
    opsets = [helper.make_opsetid("", 21)] if name == "opset" else io_models.OPSETS
    domain = "" if name == "opset" else "com.microsoft"
    w = numpy_helper.from_array(np.ones((16, 32), np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    whole = io_models.model_of([node], [w], opsets=opsets).SerializeToString()
    path = tmp_path / "cut.onnx"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=f"{size:,} bytes.*truncated, corrupt or not an ONNX"):
            model_io.load(path)
    path.write_bytes(whole)
    model_io.load(path)


def test_flipped_bytes_never_raise_anything_but_a_model_error(tmp_path):
    whole = bytearray(io_models.linear_model().SerializeToString())
    rng = np.random.default_rng(0)
    weights_at = whole.find(io_models.weights()["first"].tobytes())
    refused = 0
    path = tmp_path / "bad.onnx"
    # Structure only: before the weights (nodes, names) and between and after them (dims, types, inputs).
    spots = [*range(weights_at), *range(weights_at + 4096, weights_at + 4136), *range(len(whole) - 200, len(whole))]
    for spot in spots:
        changed = whole.copy()
        changed[spot] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            model_io.load(path)
        except ModelError:
            refused += 1
    assert refused > len(spots) // 4


def test_initializers_among_the_inputs_of_old_models_are_weights(tmp_path):
    proto = io_models.linear_model()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    names = {tensor.name for tensor in proto.graph.initializer}
    model = model_io.load(io_models.write(proto, tmp_path / "old.onnx"))
    assert set(model.graph.initializers) == names
    assert not names & {value.name for value in model.graph.inputs}


_REWRITE = """
import sys
from quarot_onnx.io import model_io
import onnx_ir as ir
def peak_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
base = peak_mib()
model = model_io.load(sys.argv[1])
for value in model.graph.initializers.values():
    old = value.const_value
    def negated(old=old):
        array = model_io.read_array(old)
        array *= -1
        return array
    value.const_value = model_io.lazy_tensor(negated, dtype=old.dtype, shape=old.shape.numpy(), name=value.name)
model_io.save(model, sys.argv[2], use_external_data=sys.argv[3] == "external")
print(peak_mib() - base)
"""


# VmHWM and not getrusage: ru_maxrss starts at the peak of the process that called fork, so that nothing seems to grow.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("mode", ["external", "single"])
def test_rewriting_every_weight_takes_the_memory_of_one(tmp_path, mode):
    # One of 12 weights of 16 MiB, where reading them all would take 192 MiB.
    source = tmp_path / "big.onnx"
    array = np.arange(4 << 20, dtype=np.float32).reshape(2048, 2048)
    names = [f"w{index}" for index in range(12)]
    tensors = [numpy_helper.from_array(array + index, name) for index, name in enumerate(names)]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    io_models.write(io_models.model_of(nodes, tensors), source)
    target = tmp_path / "out.onnx"
    command = [sys.executable, "-c", _REWRITE, str(source), str(target), mode]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 16 <= grown < 60, grown
    last = model_io.load(target).graph.initializers["w11"].const_value
    np.testing.assert_array_equal(model_io.read_rows(last, 2047, 2048), -(array + 11)[2047:])
