"""onnxruntime's optimised copy: of every layout and cache it computes the same, opened as it is meant to be."""

import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from exports import EXPORTS
from onnx import numpy_helper

from quarot_onnx import Int8Spec, KVCacheConfig, QConfig, QLayerConfig, SinkPrefixConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.errors import OutputError, VerificationError
from quarot_onnx.pipeline import quantize
from quarot_onnx.run import optimizing
from quarot_onnx.run.optimizing import optimize

IDS = np.random.default_rng(1).integers(5, 100, (1, 16))


def logits(path: Path, *, optimised: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    inputs = ModelInputs.from_path(path)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([inputs.logits], inputs.feed(IDS))[0])


@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "dynamo cache", "genai"])
def test_of_a_float_model(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    saved = optimize(source, tmp_path / "copy" / "model.onnx")
    assert saved.bytes_total == sum(
        saved.path.with_name(name).stat().st_size for name in (saved.path.name, "model.onnx.data")
    )
    np.testing.assert_array_equal(logits(saved.path, optimised=True), logits(source, optimised=False))
    packed = onnx.load(saved.path, load_external_data=False).graph.initializer
    assert any(entry.key.startswith("prepacked") for tensor in packed for entry in tensor.external_data)


@pytest.mark.parametrize(
    "algorithms",
    [
        [KVCacheConfig(8, 8)],
        [KVCacheConfig(4, 4)],
        [SinkPrefixConfig("graph", ids=(7, 3))],
        [SinkPrefixConfig("npz", ids=(7, 3))],
    ],
    ids=["8-bit cache", "4-bit cache", "prefix", "prefix beside"],
)
def test_of_a_quantized_model(algorithms: list[Any], tmp_path: Path) -> None:
    source, target = EXPORTS["optimum llama"](), tmp_path / "int8" / "model.onnx"
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    config = QConfig(QLayerConfig(weight=Int8Spec()), algo_config=algorithms)
    quantize(source, target, config, reader, verify=False, check=None)
    refused = None
    try:
        saved = optimize(target, tmp_path / "copy" / "model.onnx")
    except VerificationError as error:
        refused = str(error)
    if refused is not None:
        # Before 1.32 onnxruntime's copy of 8-bit MatMulNBits computes something else on processors without VNNI.
        assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32)
        assert "computes something else here" in refused
        assert not (tmp_path / "copy").exists()
        return
    np.testing.assert_array_equal(logits(saved.path, optimised=True), logits(target, optimised=False))
    assert {file.name for file in target.parent.iterdir()} <= {file.name for file in saved.path.parent.iterdir()}
    again = optimize(target, saved.path)  # its own may be replaced
    assert again == saved


def test_of_a_graph_that_is_no_decoder(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", width]) for name, width in (("x", 64), ("y", 32))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "m.onnx",
    )
    optimize(tmp_path / "m.onnx", tmp_path / "out" / "m.onnx")
    onnxruntime.InferenceSession(tmp_path / "out" / "m.onnx", providers=["CPUExecutionProvider"])


def test_a_copy_that_computes_something_else_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = EXPORTS["dynamo cache"]()
    real = optimizing.runtime.write_optimized

    def wrong(path: Path, target: Path, data_name: str, **options: bool) -> None:
        changed = onnx.load(path)
        table = next(tensor for tensor in changed.graph.initializer if len(tensor.dims) == 2)
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) * np.float32(1.01), table.name))
        onnx.save(changed, target.with_name("changed.onnx"))
        real(target.with_name("changed.onnx"), target, data_name, **options)

    monkeypatch.setattr(optimizing.runtime, "write_optimized", wrong)
    with pytest.raises(VerificationError, match="computes something else here: 'logits' is off by"):
        optimize(other, tmp_path / "out" / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saturates", [True, False])
def test_products_that_saturate_here_are_exact_in_the_copy(
    saturates: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The option is for when the graph is rewritten, and the copy is opened without."""
    source, target = EXPORTS["optimum llama"](), tmp_path / "int8" / "model.onnx"
    config = QConfig(QLayerConfig(activation=UInt8Spec(), weight=Int8Spec()))
    quantize(source, target, config, TokenReader(ModelInputs.from_path(source), IDS), verify=False, check=None)
    monkeypatch.setattr("quarot_onnx.graph.saturation.saturates", lambda: saturates)
    opened, usual = [], optimizing.runtime.session_options

    def seen(*arguments: Any, **options: Any) -> Any:
        opened.append((options.get("optimized_path") is not None, options["exact_products"]))
        return usual(*arguments, **options)

    monkeypatch.setattr(optimizing.runtime, "session_options", seen)
    optimize(target, tmp_path / "copy" / "model.onnx")
    assert opened == [(True, saturates), (False, saturates), (False, False)]


def test_weights_that_cannot_be_written_are_no_fault_of_the_model(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*copy/model\.onnx: .*ulimit -f"):
            optimize(EXPORTS["optimum llama"](), tmp_path / "copy" / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
