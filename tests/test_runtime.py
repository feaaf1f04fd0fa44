"""Sessions: options reach onnxruntime, failures are one line, custom operators load."""

import subprocess
import sys

import io_models
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from quarot_onnx.errors import MissingPackageError, ModelError
from quarot_onnx.io import model_io
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.skeleton import open_augmented
from quarot_onnx.threads import limited_to

X = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return io_models.write(io_models.linear_model(), tmp_path / "m.onnx")


def expected() -> np.ndarray:
    w = io_models.weights()
    return (X @ w["first"]) @ w["second"] + w["bias"]


def test_session_runs_on_the_cpu_with_the_options_asked_for(path, tmp_path):
    made = runtime.session(path, threads=1, optimized_path=tmp_path / "optimized.onnx", low_memory=True)
    assert made.get_providers() == ["CPUExecutionProvider"]
    options = made.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert (tmp_path / "optimized.onnx").exists()
    # Two float32 products of length 32 in another order: 2 * 32 roundings of 2^-24 each, of values around 32.
    np.testing.assert_allclose(made.run(None, {"x": X})[0], expected(), rtol=0, atol=2 * 32 * 2**-24 * 32)


def test_threads_are_those_that_all_work_is_limited_to(path):
    with limited_to(1):
        assert runtime.session(path).get_session_options().intra_op_num_threads == 1
        assert runtime.session(path, threads=2).get_session_options().intra_op_num_threads == 2


def test_without_optimization_the_graph_is_left_alone(path, tmp_path):
    made = runtime.session(path, optimize=False, optimized_path=tmp_path / "o.onnx")
    assert made.run(None, {"x": X})
    assert [node.op_type for node in model_io.load(tmp_path / "o.onnx").graph] == ["MatMul", "MatMul", "Add"]


def test_domains_of_a_graph_include_subgraphs_and_imports(path):
    model = model_io.load(path)
    assert runtime.graph_domains(model) == {"", "com.microsoft"}
    model.graph[0].domain = "ai.onnx.contrib"
    assert runtime.graph_domains(model) == {"", "com.microsoft", "ai.onnx.contrib"}


def test_what_onnxruntime_refuses_is_a_one_line_model_error(tmp_path):
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"])]
    source = io_models.write(io_models.model_of(nodes, []), tmp_path / "odd.onnx")
    with pytest.raises(ModelError, match="NoSuchOperator") as caught:
        runtime.session(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message


def test_errors_of_many_lines_become_one(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ModelError, match=r"cannot load .*: first second$"):
        runtime.session(path)


def test_bfloat16_has_a_way_out(tmp_path):
    """onnxruntime's CPU has few kernels for it."""
    nodes = [helper.make_node("Cast", ["x"], ["b"], to=16), helper.make_node("Erf", ["b"], ["c"])]
    nodes.append(helper.make_node("Cast", ["c"], ["y"], to=1))
    source = io_models.write(io_models.model_of(nodes, []), tmp_path / "half.onnx")
    for work in (runtime.session, lambda path: open_augmented(model_io.load(path))):
        with pytest.raises(ModelError, match=r"float32 and float16 first of all: export the model as one of them$"):
            work(source)


def test_missing_and_damaged_files_are_model_errors(tmp_path):
    with pytest.raises(ModelError, match="no model file"):
        runtime.session(tmp_path / "no.onnx")
    for content in (b"", b"\xff" * 30, b"version https://git-lfs"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.onnx"):
            runtime.session(tmp_path / "bad.onnx")


def contrib_model(tmp_path):
    """A graph with an operator of onnxruntime-extensions, and plain arithmetic beside it."""
    text = helper.make_tensor_value_info("s", TensorProto.STRING, ["n"])
    upper = helper.make_tensor_value_info("u", TensorProto.STRING, ["n"])
    node = helper.make_node("StringUpper", ["s"], ["u"], domain="ai.onnx.contrib")
    graph = helper.make_graph([node], "contrib", [text], [upper])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    return io_models.write(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "contrib.onnx")


def test_onnxruntime_extensions_are_registered_when_the_graph_needs_them(tmp_path):
    path = contrib_model(tmp_path)
    assert runtime.session(path).run(None, {"s": np.array(["abc"])})[0].tolist() == ["ABC"]


def test_without_the_extensions_the_pip_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(MissingPackageError, match=r"ai\.onnx\.contrib.*pip install onnxruntime-extensions"):
        runtime.session(contrib_model(tmp_path))


def test_importing_does_not_import_onnxruntime():
    code = "import sys, quarot_onnx.sessions.runtime, quarot_onnx.io.model_io; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_that_solves_nothing_does_not_import_scipy():
    code = "import sys, quarot_onnx.cli.quantizing, quarot_onnx.pipeline; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_spin_only_where_time_counts(path):
    key = "session.intra_op.allow_spinning"
    assert runtime.session(path).get_session_options().get_session_config_entry(key) == "0"
    with pytest.raises(RuntimeError, match=key):  # not set: onnxruntime's default, which is to spin
        runtime.session(path, timed=True).get_session_options().get_session_config_entry(key)
