"""What fills up a batch that the graph fixes counts for nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import odd_decoders as odd
import onnx
import pytest
from onnx import numpy_helper

from quarot_onnx import GPTQConfig, KVCacheConfig, QConfig, QLayerConfig, SinkPrefixConfig, UInt8Spec
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import texts_of
from quarot_onnx.calibration.padding import Padding
from quarot_onnx.calibration.readers import NpzReader, TokenReader, wrap
from quarot_onnx.config import Int4Spec, Int8Spec
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize

IDS = np.random.default_rng(0).integers(5, 100, (4, 16))
GPTQ = QConfig(QLayerConfig(weight=Int4Spec()), algo_config=[GPTQConfig()], exclude=["/lm_head/MatMul"])
PERCENTILE = UInt8Spec(calibration_method=CalibMethod.Percentile, percentile=95.0)
CONFIGS = {
    "gptq": GPTQ,
    "static": QConfig(QLayerConfig(PERCENTILE, Int8Spec()), bias_correction=True),
    "cache": QConfig(None, algo_config=[KVCacheConfig(4, 4, scales="channel", k_balance=False)]),
    "prefix": QConfig(
        QLayerConfig(weight=Int4Spec()),
        algo_config=[SinkPrefixConfig("graph", ids=(7, 3)), GPTQConfig()],
        exclude=["/lm_head/MatMul"],
    ),
}


def fixed(source: Path, folder: Path, batch: int) -> Path:
    """The same model with a batch that is fixed."""
    shutil.copytree(source.parent, folder)
    model = onnx.load(folder / source.name, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        dim = value.type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_value = batch
    onnx.save(model, folder / source.name)
    return folder / source.name


def tensors(source: Path, target: Path, config: QConfig) -> dict[str, np.ndarray]:
    reader = TokenReader(ModelInputs.from_path(source), IDS, source, decode_steps=0)  # fixed batches have none
    quantize(source, target, config, reader, verify=False, check=None)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}


BALANCED = QConfig(None, algo_config=[KVCacheConfig(4, 4, k_balance=True)])
EXPORTS = pytest.mark.parametrize(
    "export", [lambda: exports.optimum_export("llama"), exports.genai_like], ids=["optimum", "genai"]
)


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert array.dtype == found[name].dtype
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4 * np.abs(array).max(initial=0))
        else:  # a float product may fall to the other side of a half
            assert (found[name] != array).sum() <= 0.01 * array.size, name


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("config", CONFIGS)
@EXPORTS
def test_windows_weigh_alike(export: Callable[[], Path], config: str, batch: int, tmp_path: Path) -> None:
    source = export()
    found = tensors(fixed(source, tmp_path / "source", batch), tmp_path / "filled" / "m.onnx", CONFIGS[config])
    same(found, tensors(source, tmp_path / "free" / "m.onnx", CONFIGS[config]))


@pytest.mark.parametrize("export", ["optimum llama", "dynamo cache 23"])
def test_windows_weigh_alike_behind_a_prefix_in_a_file(export: str, tmp_path: Path) -> None:
    source = exports.EXPORTS[export]()
    config = QConfig(CONFIGS["static"].global_config, algo_config=[SinkPrefixConfig("npz", ids=(7, 3))])
    found = tensors(fixed(source, tmp_path / "source", 3), tmp_path / "filled" / "m.onnx", config)
    same(found, tensors(source, tmp_path / "free" / "m.onnx", config))


@EXPORTS
def test_balanced_keys(export: Callable[[], Path], tmp_path: Path) -> None:
    """Samples stand at positions that their number decides: here one, of 4 rows that count."""
    filled, whole = (
        tensors(fixed(export(), tmp_path / f"{batch}", batch), tmp_path / f"out-{batch}" / "m.onnx", BALANCED)
        for batch in (6, 4)
    )
    same(filled, whole)


@pytest.mark.parametrize("lengths", [{}, {"seq": 4, "past": 12, "mask": "ones"}, {"seq": 4, "past": 12, "total": 16}])
def test_as_many_tokens_as_there_are(lengths: dict[str, int | str], tmp_path: Path) -> None:
    source = odd.write(tmp_path, odd.Spec(batch=3, **lengths))  # type: ignore[arg-type]
    ids = IDS % odd.VOCAB
    inputs, model = ModelInputs.from_path(source), model_io.load(source)
    reader = TokenReader(inputs, ids, source)
    padding = Padding(model)
    found = [padding.tokens(feeds, number) for number, feeds in enumerate(wrap(reader))]
    assert sum(row.size for row in found if row is not None) == ids.size
    # What onnxruntime is fed is whole, by whomever the reader is read.
    assert all(feeds.keys() == {spec.name for spec in inputs.inputs} for feeds in reader)
    assert {len(feeds[inputs.tokens]) for feeds in reader} == {3}


def test_rows_of_an_archive(tmp_path: Path) -> None:
    source = odd.write(tmp_path, odd.Spec(batch=3))
    np.savez(tmp_path / "ids.npz", **{ModelInputs.from_path(source).tokens: IDS % odd.VOCAB})
    reader, padding = NpzReader(tmp_path / "ids.npz", ModelInputs.from_path(source)), Padding(model_io.load(source))
    samples = [part for number, feeds in enumerate(wrap(reader)) for part in padding.samples(feeds, number)]
    assert [padding.rows(sample) for sample in samples] == [16] * 4


def test_texts_are_those_that_were_given(tmp_path: Path) -> None:
    source = odd.write(tmp_path, odd.Spec(batch=3, mask="ones"))
    samples: list[Feeds] = list(wrap(TokenReader(ModelInputs.from_path(source), IDS % odd.VOCAB)))
    texts = texts_of(model_io.load(source), samples)
    assert [text.shape for text in texts] == [(3, 16), (1, 16)]
    np.testing.assert_array_equal(np.concatenate(texts), IDS % odd.VOCAB)
