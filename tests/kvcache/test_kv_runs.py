"""A quantized cache from the command line to the finished model: the same bytes, refusals, and what is told."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import exports
import numpy as np
import odd_decoders as odd
import onnx
import pytest
from command_line import Shell, files
from onnx import numpy_helper

from quarot_onnx import (
    GPTQConfig,
    Int4Spec,
    KVCacheConfig,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QuantGranularity,
    QuarotConfig,
    UInt8Spec,
)
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.pipeline import quantize

FEW = ("--calib-samples", 4, "--calib-seq-len", 65)
CACHE = {"k_bits": 4, "v_bits": 4, "k_groupsize": 16, "v_groupsize": 16, "k_asym": True, "v_asym": True}


@pytest.mark.further
def test_configuration_recipe_options_and_the_studies_names_write_the_same(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = exports.optimum_export("llama")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "rotation: {}\nweights: {method: gptq, bits: 4, clip: false}\nactivations: {bits: 8}\n"
        "kv_cache: {bits: 4, k_groupsize: 16, v_groupsize: 16, k_asym: true, v_asym: true}\n"
        f"calibration: {{text: {text}, samples: 4, seq_len: 65}}\n"
    )
    shell.ok("quantize", source, tmp_path / "recipe" / "model.onnx", "--recipe", recipe)
    weights = ("--w-bits", 4, "--weights", "gptq", "--no-w-clip", "--a-bits", 8, "--calib-text", text, *FEW)
    groups = ("--k-groupsize", 16, "--v-groupsize", 16, "--k-asym", "--v-asym")
    shell.ok("quantize", source, tmp_path / "options" / "model.onnx", *weights, "--kv-bits", 4, *groups)
    studies = ("--k_bits", 4, "--v_bits", 4, "--k_groupsize", 16, "--v_groupsize", 16, "--k_asym", "--v_asym")
    shell.ok("quantize", source, tmp_path / "studies" / "model.onnx", *weights, *studies)
    config = json.loads((tmp_path / "options" / "model.quarot.json").read_text())["quantization"]["config"]
    names = [item["name"] for item in config["algo_config"]]
    assert names == ["quarot", "gptq", "kv_cache"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shell.ok(
        "quantize", source, tmp_path / "config" / "model.onnx", "--config", tmp_path / "config.json",
        "--calib-text", text, *FEW,
    )  # fmt: skip
    written = [files(tmp_path / name)["model.onnx"] for name in ("recipe", "options", "studies", "config")]
    assert len(set(written)) == 1
    activation = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
    python = QConfig(
        QLayerConfig(activation, Int4Spec(quant_granularity=QuantGranularity.Channel)),
        algo_config=[QuarotConfig(), GPTQConfig(mse=False), KVCacheConfig(**CACHE)],
        exclude=config["exclude"],
    )
    assert python.kv_cache == QConfig.from_dict(config).kv_cache


def test_fixed_scales_need_data(tmp_path: Path) -> None:
    source = exports.genai_like()
    with pytest.raises(CalibrationError, match="fixed scales of the key/value cache need calibration data"):
        quantize(source, tmp_path / "m.onnx", QConfig(None, algo_config=[KVCacheConfig(bits=8)]))


def test_what_is_told(shell: Shell, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    result = shell.ok("quantize", source, tmp_path / "a" / "model.onnx", "--w-bits", 16, "--kv-bits", 8)
    assert "the key/value cache takes 288 bytes a position in place of 1024" in result.err
    assert "R3" in result.out
    result = shell.ok("quantize", source, tmp_path / "b" / "model.onnx", "--w-bits", 16, "--kv-bits", 2)
    assert "the key/value cache is rounded and stays in float, nothing gets smaller: --kv-bits 2" in result.err
    assert "its form is fake" not in result.err  # said once
    assert "kv_cache" in shell.ok("inspect", tmp_path / "b" / "model.onnx", "--json").out


@pytest.mark.parametrize("scales", ["token", "head"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_integers_is_not_quantized_again(shell: Shell, bits: int, scales: str, tmp_path: Path) -> None:
    once, bare, again = (tmp_path / name / "model.onnx" for name in ("once", "bare", "again"))
    options = ("--w-bits", 16, "--kv-bits", bits, "--kv-scales", scales)
    data = FEW if scales == "head" else ()
    shell.ok("quantize", exports.optimum_export("llama"), once, *options, *data, "--no-check")
    model = onnx.load(once)
    del model.metadata_props[:]
    bare.parent.mkdir()
    onnx.save(model, bare)
    for path in (once, bare):  # of another tool's output nothing is recorded
        error = shell.fails("quantize", path, again, "--w-bits", 16, "--kv-bits", 8)
        assert "the key/value cache is quantized already ('past_key_values.0.key' is " in error


@pytest.mark.parametrize(("exporter", "scales"), [("optimum", "token"), ("optimum", "head"), ("genai", "channel")])
def test_a_quantized_cache_is_left_out_of_what_verify_compares(exporter: str, scales: str, tmp_path: Path) -> None:
    source = exports.optimum_export("llama") if exporter == "optimum" else exports.genai_like()
    reader = TokenReader(ModelInputs.from_path(source), np.random.default_rng(0).integers(5, 100, (4, 24)))
    target = tmp_path / "model.onnx"
    quantize(source, target, QConfig(None, algo_config=[KVCacheConfig(8, 8, scales=scales)]), reader, check=None)
    for first, second, which in ((source, target, "second"), (target, source, "first")):
        found = compare(first, second, real_tokens=0)
        assert [output.name for output in found.outputs] == ["logits"]
        assert found.not_compared["present.0.key"] == f"the {which} model puts out integers"


@pytest.mark.parametrize(("past", "batch"), [(12, 1), (15, 1), (12, 2)])
@pytest.mark.parametrize("scales", ["head", "channel"])
def test_fixed_scales_where_a_graph_fixes_its_lengths(scales: str, past: int, batch: int, tmp_path: Path) -> None:
    """Windows run in pieces behind a cache that is padded; what its mask hides has no part in any scale."""
    found = []
    for spec in (odd.Spec(), odd.Spec(batch=batch, seq=16 - past, past=past, mask="ones")):
        source = odd.write(tmp_path / f"{spec.past}", spec)
        ids = np.random.default_rng(8).integers(0, odd.VOCAB, (3, 16))
        reader = TokenReader(ModelInputs.from_path(source), ids, source)
        target = tmp_path / "out" / f"{spec.past}.onnx"
        quantize(source, target, QConfig(None, algo_config=[KVCacheConfig(8, 8, scales=scales)]), reader, check=None)
        tensors = onnx.load(target).graph.initializer
        found.append([numpy_helper.to_array(tensor) for tensor in tensors if "cache_scale" in tensor.name])
    assert len(found[0]) == 2
    for free, fixed in zip(*found, strict=True):
        np.testing.assert_allclose(fixed, free, rtol=1e-5)


class OneRead:
    """A user's reader that cannot begin again."""

    def __init__(self, source: Path) -> None:
        inputs = ModelInputs.from_path(source)
        self._feeds = iter([inputs.feed(row[None]) for row in np.random.default_rng(0).integers(5, 100, (4, 24))])

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def test_a_reader_without_rewind_serves_ranges_and_scales(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    layer = QLayerConfig(UInt8Spec(), UInt8Spec(symmetric=True))
    config = QConfig(layer, algo_config=[KVCacheConfig(8, 8, scales="head")])
    quantize(source, tmp_path / "model.onnx", config, OneRead(source), check=None)
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("exporter", ["optimum", "genai"])
@pytest.mark.parametrize("bits", [8, 4])
def test_perplexity_through_the_cache_is_that_of_the_prefill(exporter: str, bits: int, tmp_path: Path) -> None:
    source = exports.optimum_export("llama") if exporter == "optimum" else exports.genai_like(tied_transposed=False)
    folder = exports.optimum_export("llama").parent
    reader = TokenReader(ModelInputs.from_path(source), np.random.default_rng(0).integers(5, 100, (4, 64)))
    target = tmp_path / "model.onnx"
    config = QConfig(None, algo_config=[QuarotConfig(), KVCacheConfig(bits=bits)])
    ModelQuantizer(config).quantize_model(source, target, reader)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    whole, decoded = (
        perplexity(target, text, folder, seq_len=48, windows=2, decode=decode).perplexity for decode in (0, 24)
    )
    assert decoded == pytest.approx(whole, rel=1e-4)


def test_decoding_needs_a_cache_and_something_before_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    folder = exports.optimum_export("llama").parent
    with pytest.raises(ModelError, match="has no cache to decode on"):
        perplexity(exports.dynamo_export("llama"), text, folder, seq_len=32, windows=1, decode=4)
    with pytest.raises(CalibrationError, match="leave nothing to prefill before 32"):
        perplexity(exports.optimum_export("llama"), text, folder, seq_len=32, windows=1, decode=32)


def test_order_and_number_in_a_configuration() -> None:
    with pytest.raises(ConfigError, match="the cache stands too early"):
        QConfig(QLayerConfig(weight=UInt8Spec(symmetric=True)), algo_config=[KVCacheConfig(8, 8), QuarotConfig()])
    with pytest.raises(ConfigError, match="more than one KVCacheConfig"):
        QConfig(None, algo_config=[KVCacheConfig(8, 8), KVCacheConfig(4, 4)])
    assert QConfig(None, algo_config=[KVCacheConfig(16, None)]).kv_cache is None


def test_settings_of_what_stays_in_float_change_nothing() -> None:
    config = KVCacheConfig(v_bits=8, k_pre_rope=True, k_asym=True, form="int")
    assert config.notes == ("of no effect, as keys stay in float: k_asym=True, k_pre_rope=True",)
    assert KVCacheConfig(scales="head").notes == ("of no effect, as the key/value cache stays in float: scales='head'",)


def otherwise(source: Path, folder: Path, layers: Collection[int]) -> Path:
    """The same model; the pasts of some layers go through a Cast, as a cache of another type would."""
    shutil.copytree(source.parent, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    model = onnx.load(source)
    names = {f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in names and node.op_type in {"Concat", "GroupQueryAttention"}:
                node.input[index] = f"{name}_cast"
    for name in sorted(names):
        cast = onnx.helper.make_node("Cast", [name], [f"{name}_cast"], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def types(path: Path) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.input}


@pytest.mark.parametrize("options", [("--kv-bits", 8), ("--kv-bits", 3)])
def test_a_layer_that_keeps_its_cache_otherwise_stays_in_float(
    shell: Shell, options: tuple[object, ...], tmp_path: Path
) -> None:
    source = otherwise(exports.optimum_export("llama"), tmp_path / "odd", {1})
    told = shell.ok("quantize", source, tmp_path / "out", "--w-bits", 16, *options).err
    assert "left in float at /model/layers.1/self_attn/Softmax: its cache is no input [batch, heads, " in told
    found = types(tmp_path / "out" / "model.onnx")
    first = onnx.TensorProto.INT8 if 8 in options else onnx.TensorProto.FLOAT
    assert (found["past_key_values.0.key"], found["past_key_values.0.value"]) == (first, first)
    assert found["past_key_values.1.key"] == found["past_key_values.1.value"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("exporter", "layers"), [("optimum", (0, 1)), ("genai", (1,)), ("genai", (0, 1))])
def test_caches_that_are_kept_otherwise_are_refused_by_name(
    shell: Shell, exporter: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    export = exports.optimum_export("llama") if exporter == "optimum" else exports.genai_like()
    source = otherwise(export, tmp_path / "odd", layers)
    error = shell.fails("quantize", source, tmp_path / "out" / "model.onnx", "--w-bits", 16, "--kv-bits", 8, *FEW)
    assert f"layers.{layers[0]}/" in error
    assert "leave the cache in float, or export the model so that all layers keep their caches alike" in error
    assert ("keeps its own, all of which have one type" in error) == (len(layers) == 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["auto", "fake"])
def test_keys_of_another_size_than_values_are_refused(form: str, shell: Shell, tmp_path: Path) -> None:
    """As latent attention has them: 16 numbers without RoPE beside 16 with it, and values of 16."""
    model = onnx.load(exports.EXPORTS["optimum llama"]())
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(".key"):
            value.type.tensor_type.shape.dim[3].dim_value = 64
    onnx.save(model, tmp_path / "m.onnx")
    said = shell.fails("quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--kv-bits", 8, "--kv-format", form)
    assert "its cache 'past_key_values.0.key' holds heads of 64 and its values are of 32" in said
    assert not (tmp_path / "q.onnx").exists()
