"""Fixed scales of a cache in the file of onnxruntime-genai's model builder: written, read, refused."""

import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from command_line import Shell, files
from genai_graph import HEAD_DIM, KV_HEADS
from numpy.typing import NDArray

from quarot_onnx import KVCacheConfig, QConfig, QuarotConfig, SmoothQuantConfig
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.config import QLayerConfig, UInt8Spec
from quarot_onnx.errors import ConfigError, VerificationError
from quarot_onnx.evaluation.check import Check
from quarot_onnx.evaluation.fidelity import Limits
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.sites.attention import K_SCALE

LAYERS, CHANNELS = 2, KV_HEADS * HEAD_DIM
GROWING = np.linspace(0.01, 0.2, 2 * LAYERS * CHANNELS, dtype=np.float32).reshape(2, LAYERS, CHANNELS)
"""Scales of keys and of values, by layer and channel; none equals another."""


def reader(source: Path) -> TokenReader:
    return TokenReader(ModelInputs.from_path(source), np.random.default_rng(0).integers(5, 100, (4, 24)))


def theirs(path: Path, scales: NDArray[np.float32] = GROWING, **more: object) -> Path:
    """A file as the builder's own tool writes it."""
    content = {"scales": {"k_scales": scales[0].tolist(), "v_scales": scales[1].tolist()}, **more}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def in_graph(path: Path) -> NDArray[np.float32]:
    """The scales that the operators have, [keys and values, layers, ...]."""
    nodes = [node for node in model_io.load(path).graph if node.op_type == "GroupQueryAttention"]
    found = [[node.inputs[K_SCALE + side].const_value.numpy().reshape(-1) for node in nodes] for side in (0, 1)]  # type: ignore[union-attr]
    return np.array(found)


def taken(source: Path, target: Path, *algorithms: QuarotConfig, **cache: Any) -> NDArray[np.float32]:
    """The scales in the graph of a model whose cache has those of a file; there is no calibration data."""
    quantize(source, target, QConfig(None, algo_config=[*algorithms, KVCacheConfig(**cache)]), check=None)
    return in_graph(target)


@pytest.mark.parametrize(
    ("bits", "scales", "size"), [(8, "auto", CHANNELS), (4, "channel", CHANNELS), (8, "tensor", 1)]
)
def test_what_is_written_is_read_again(bits: int, scales: str, size: int, tmp_path: Path) -> None:
    source, first, again = exports.genai_like(), tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    cache = KVCacheConfig(bits=bits, scales=scales, k_balance=False)
    config = QConfig(None, algo_config=[QuarotConfig(), cache])
    quantize(source, first, config, reader(source), check=None)
    path = first.with_name("model.kv_scales.json")
    report = json.loads((tmp_path / "a" / "model.quarot.json").read_text())
    assert report["kv_cache"] == {"scale_file": path.name}
    assert path.name in report["beside"]["companions"]
    content = json.loads(path.read_text())
    assert content["layer_ids"] == [0, 1]
    assert content["qmax"] == {8: 128, 4: 8}[bits]  # the builder's own, for which it changes nothing
    own = in_graph(first)
    assert own.shape == (2, LAYERS, size)
    for side, what in enumerate(("k_scales", "v_scales")):
        assert np.array_equal(np.array(content["scales"][what], np.float32), own[side])
    assert np.array_equal(taken(source, again, QuarotConfig(), bits=bits, scale_file=path), own)
    assert path.read_bytes() == again.with_name(path.name).read_bytes()


def test_scales_of_balanced_keys_are_not_taken_for_others(tmp_path: Path) -> None:
    source, first = exports.genai_like(), tmp_path / "a" / "model.onnx"
    config = QConfig(None, algo_config=[QuarotConfig(), KVCacheConfig(bits=4, scales="channel")])
    quantize(source, first, config, reader(source), check=None)
    path = first.with_name("model.kv_scales.json")
    with pytest.raises(ConfigError, match=r"its scales are of keys that are rotated or scaled, and R3\[32\] was done"):
        taken(source, tmp_path / "m.onnx", QuarotConfig(), bits=4, scale_file=path)
    with pytest.raises(ConfigError, match=r"k_balance=True: the scales of .* are of other keys"):
        KVCacheConfig(4, 4, k_balance=True, scale_file=path)


@pytest.mark.parametrize(
    ("bits", "qmax", "factor"),
    [(8, 128.0, 1), (8, None, 1), (4, None, 1), (4, 128.0, 16), (8, 8, 1 / 16), (8, 448, 3.5)],
)
def test_scales_are_for_the_integers_that_are_wanted(
    bits: int, qmax: float | None, factor: float, tmp_path: Path
) -> None:
    path = theirs(tmp_path / "kv.json", qmax=qmax)
    assert np.array_equal(
        taken(exports.genai_like(), tmp_path / "m.onnx", bits=bits, scale_file=path), GROWING * factor
    )


def test_entries_go_to_the_layers_that_are_named(tmp_path: Path) -> None:
    path = theirs(tmp_path / "kv.json", layer_ids=[1, 0])
    assert np.array_equal(taken(exports.genai_like(), tmp_path / "m.onnx", bits=8, scale_file=path), GROWING[:, ::-1])


def test_channels_are_taken_head_by_head(tmp_path: Path) -> None:
    """The cache is [batch, heads, positions, head_dim]; the operator takes the scales of a head together."""
    source = exports.genai_like()
    taken(source, tmp_path / "m.onnx", bits=8, scale_file=theirs(tmp_path / "kv.json"))
    node = next(node for node in model_io.load(tmp_path / "m.onnx").graph if node.op_type == "GroupQueryAttention")
    value = node.inputs[K_SCALE]
    assert value is not None
    assert value.const_value is not None
    assert np.array_equal(value.const_value.numpy(), GROWING[0, 0].reshape(1, KV_HEADS, 1, HEAD_DIM))


@pytest.mark.parametrize("entry", [0.05, [0.05], [[[0.05]]]])
def test_one_scale_for_the_whole_tensor(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    path.write_text(json.dumps({"scales": {"k_scales": [entry] * 2, "v_scales": [entry] * 2}}))
    found = taken(exports.genai_like(), tmp_path / "m.onnx", bits=8, scale_file=path)
    assert np.array_equal(found, np.full((2, LAYERS, 1), 0.05, np.float32))


def test_a_section_for_the_decoder_among_others(tmp_path: Path) -> None:
    inner = json.loads(theirs(tmp_path / "kv.json").read_text())
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"mtp": {"scales": {}}, "model": inner}))
    assert np.array_equal(taken(exports.genai_like(), tmp_path / "m.onnx", bits=8, scale_file=path), GROWING)


@pytest.mark.parametrize("k_bits", [8, None])
def test_attentions_that_are_spelt_out_take_them_too(k_bits: int | None, tmp_path: Path) -> None:
    source, target = exports.optimum_export("llama"), tmp_path / "m.onnx"
    config = QConfig(None, algo_config=[KVCacheConfig(k_bits, 8, scale_file=theirs(tmp_path / "kv.json"))])
    quantize(source, target, config, check=None)
    tensors = model_io.load(target).graph.initializers.values()
    found = {tensor.const_value.numpy().tobytes() for tensor in tensors if "cache_scale" in (tensor.name or "")}  # type: ignore[union-attr]
    want = GROWING if k_bits is not None else GROWING[1:]
    assert found == {row.tobytes() for row in want.reshape(-1, CHANNELS)}
    assert not (tmp_path / "m.kv_scales.json").exists()


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"scales": {"k_scales": GROWING[0].tolist()}}, "ScaleFile.scales.v_scales: is missing"),
    ({"scales": {}}, "ScaleFile.scales.k_scales: is missing"),
    ({"layer_ids": [0]}, "2 k_scales, 2 v_scales, 1 layer_ids: every layer needs one of each"),
    ({"layer_ids": [0, 0]}, "names a layer twice"),
    ({"layer_ids": [0, 2]}, "it has scales of layers 0, 2, and the graph caches layers 0 to 1"),
    ({"scales": {"k_scales": [[1.0]] * 3, "v_scales": [[1.0]] * 3}}, "or say which layers they are of (layer_ids)"),
    ({"scales": {"k_scales": [[1.0] * 5] * 2, "v_scales": [[1.0]] * 2}}, "has 2 heads of 32: need 1 for the whole"),
    ({"scales": {"k_scales": [[0.0]] * 2, "v_scales": [[1.0]] * 2}}, "k_scales[0][0]=0.0: Input should be greater"),
    ({"scales": {"k_scales": ["wide"] * 2, "v_scales": [[1.0]] * 2}}, "k_scales[0]='wide': a layer has one scale"),
    ({"scales": {"k_scales": [[1.0]] * 2, "v_scales": [[1e-44]] * 2}, "qmax": 1e-9}, "layer 0's values do not fit"),
    ({"qmax": -1.0}, "qmax=-1.0: Input should be greater than 0"),
    ({"qmax": True}, "qmax=True"),
    ({"layers": [0, 1]}, "unknown key 'layers' (did you mean 'layer_ids'?)"),
]


@pytest.mark.parametrize(("change", "named"), BROKEN)
def test_a_file_that_does_not_fit(shell: Shell, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = theirs(tmp_path / "kv.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    options = ("--w-bits", 16, "--kv-bits", 8, "--no-rotate", "--kv-scale-file", path)
    error = shell.fails("quantize", exports.genai_like(), tmp_path / "out" / "model.onnx", *options)
    assert error.startswith(f"error: {path}: ")
    assert named in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_file_that_is_none(shell: Shell, content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    if content is not None:
        path.write_text(content)
    options = ("--w-bits", 16, "--kv-bits", 8, "--no-rotate", "--kv-scale-file", path)
    assert str(path) in shell.fails("quantize", exports.genai_like(), tmp_path / "out" / "model.onnx", *options)


@pytest.mark.parametrize(
    ("rotation", "named"),
    [
        (QuarotConfig(), "its scales are of keys as the exported model has them, and R3[32] was done"),
        (QuarotConfig(r3=True, r2=False), "leave it out (r3=False)"),
        (QuarotConfig(r3=False), "of values as the exported model has them, and R2[32] was done"),
    ],
)
def test_scales_of_plain_keys_are_not_taken_for_rotated_ones(
    rotation: QuarotConfig, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quarot_onnx.pipeline.prepared", lambda *_: pytest.fail("told after long work"))
    config = QConfig(None, algo_config=[rotation, KVCacheConfig(bits=8, scale_file=theirs(tmp_path / "kv.json"))])
    with pytest.raises(ConfigError) as caught:
        quantize(exports.genai_like(), tmp_path / "out" / "m.onnx", config)
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_r1_does_not_reach_the_cache(tmp_path: Path) -> None:
    path = theirs(tmp_path / "kv.json")
    rotation = QuarotConfig(r2=False, r3=False)
    assert np.array_equal(taken(exports.genai_like(), tmp_path / "m.onnx", rotation, bits=8, scale_file=path), GROWING)


@pytest.mark.parametrize(
    ("rotation", "named"),
    [
        (QuarotConfig(r3=False), "of keys that are rotated or scaled, and here they are not"),
        (QuarotConfig(r2=False), "of values that are rotated or scaled, and here they are not"),
        (QuarotConfig(use_random_had=True, seed=3), "of values that are rotated or scaled, and R2[32] was done"),
    ],
)
def test_scales_of_another_rotation(rotation: QuarotConfig, named: str, tmp_path: Path) -> None:
    source, first = exports.genai_like(), tmp_path / "a" / "model.onnx"
    config = QConfig(None, algo_config=[QuarotConfig(), KVCacheConfig(bits=8)])
    quantize(source, first, config, reader(source), check=None)
    with pytest.raises(ConfigError) as caught:
        taken(source, tmp_path / "b.onnx", rotation, bits=8, scale_file=first.with_name("model.kv_scales.json"))
    assert named in str(caught.value)


def test_smoothed_values_have_other_scales(tmp_path: Path) -> None:
    layer = QLayerConfig(UInt8Spec(), UInt8Spec(symmetric=True))
    cache = KVCacheConfig(bits=8, scale_file=theirs(tmp_path / "kv.json"))
    config = QConfig(layer, algo_config=[SmoothQuantConfig(alpha=0.5), cache])
    source = exports.genai_like()
    with pytest.raises(ConfigError, match="not of what SmoothQuant makes of the values"):
        quantize(source, tmp_path / "m.onnx", config, reader(source))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": 8, "scales": "head"}, "scales='head': scale_file='kv.json' says what has a scale"),
        (
            {"bits": 8, "v_clip_ratio": 0.9},
            "v_clip_ratio=0.9: the scales of scale_file='kv.json' are taken as they are",
        ),
        ({"bits": 3}, "scale_file='kv.json': k_bits=3: integers are kept with 8 or 4 bits"),
        ({"bits": 8, "form": "fake"}, "scale_file='kv.json': form='fake', and fake scales are found for each token"),
    ],
)
def test_settings_beside_a_file(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KVCacheConfig(**settings, scale_file="kv.json")
    assert named in str(caught.value)


def test_what_a_file_is_of_no_use_for_is_told() -> None:
    assert KVCacheConfig(scale_file="kv.json").notes == (
        "of no effect, as the key/value cache stays in float: scale_file='kv.json'",
    )


def test_a_recipe_names_it_from_its_own_folder(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = theirs(tmp_path / "recipes" / "kv.json"), exports.genai_like()
    recipe = path.with_name("own.yaml")
    recipe.write_text("weights: {bits: 16}\nkv_cache: {bits: 8, scale_file: kv.json}\n")
    monkeypatch.chdir(path.parent)
    options = ("--w-bits", 16, "--kv-bits", 8, "--no-rotate", "--kv-scale-file", "kv.json")
    result = shell.ok("quantize", source, tmp_path / "a" / "model.onnx", *options, "--no-check")
    assert "model.kv_scales.json" in result.err
    monkeypatch.chdir(tmp_path)
    shell.ok("quantize", source, tmp_path / "b" / "model.onnx", "--recipe", recipe, "--no-check")
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first["model.onnx"] == second["model.onnx"]
    assert first["model.kv_scales.json"] == second["model.kv_scales.json"]


def test_it_appears_with_the_model_or_not_at_all(tmp_path: Path) -> None:
    source, target = exports.genai_like(), tmp_path / "out" / "model.onnx"
    config = QConfig(None, algo_config=[KVCacheConfig(bits=4)])
    with pytest.raises(VerificationError):
        quantize(source, target, config, reader(source), check=Check(limits=Limits(max_kl=0.0)))
    assert not target.parent.exists()
