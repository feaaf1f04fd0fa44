import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarot_onnx.config import Int8Spec, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.errors import ConfigError, OutputError

booleans = st.booleans()
activations = st.builds(
    UInt8Spec,
    symmetric=booleans,
    calibration_method=st.sampled_from(["MinMax", "Percentile"]),
    percentile=st.floats(50, 100, exclude_min=True),
)
weights = st.builds(Int8Spec, symmetric=booleans, quant_granularity=st.sampled_from(["Tensor", "Channel"]))
layers = st.builds(QLayerConfig, weight=weights) | st.builds(
    QLayerConfig, activation=activations, weight=weights, output_tensors=st.none() | activations
)
names = st.lists(st.text("/abc.*?[]é ", min_size=1, max_size=8), min_size=1, max_size=3)
rotations = st.builds(
    QuarotConfig,
    r_matrix_dim=st.none() | st.integers(1, 9999),
    use_random_had=booleans,
    r_config_path=st.none() | st.sampled_from(["r.json", "/a/r.json"]),
    r4=st.none() | booleans,
    seed=st.integers(0, 2**40),
)
configs = st.builds(
    QConfig,
    st.none() | layers,
    st.lists(st.tuples(st.none() | layers, names), max_size=2),
    st.lists(st.tuples(st.none() | layers, st.just(["Gemm"])), max_size=1),
    st.just([]) | names,
    st.lists(rotations, max_size=1),
    booleans,
    CalibDataSize=st.none() | st.integers(1, 100),
    WeightsOnly=booleans,
    OpTypesToQuantize=st.sampled_from([["MatMul"], ["MatMul", "Gemm", "Gather"]]),
    OptimizeModel=booleans,
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_dicts_round_trip(config):
    plain = config.to_dict()
    assert QConfig.from_dict(plain) == config
    assert QConfig.from_dict(json.loads(json.dumps(plain))).to_dict() == plain


FULL = QConfig(
    QLayerConfig(UInt8Spec(), Int8Spec()),
    {QLayerConfig(weight=Int8Spec()): ["/a", "^/b.*"], None: ["/c"]},
    {None: ["Gemm"]},
    ["/lm_head/*"],
    [QuarotConfig(64, r4=False, seed=7)],
    ActivationSymmetric=True,
    Percentile=99.9,
    SimplifyModel=False,
)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_files_round_trip(tmp_path, suffix):
    path = tmp_path / f"q.{suffix}"
    (FULL.to_json if suffix == "json" else FULL.to_yaml)(path)
    assert QConfig.load(path) == FULL
    assert QConfig.load(str(path)).notes == FULL.notes


def test_rules_are_written_as_config_and_layers():
    rule = FULL.to_dict()["specific_layer_config"][1]
    assert rule == {"config": None, "layers": ["/c"]}


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text(
        """
global_config:
  activation: uint8
  weight: {data_type: int8, quant_granularity: per_channel}
specific_layer_config:
  /model/layers.0/mlp/down_proj/MatMul: {weight: int8}
  /lm_head/MatMul: null
algo_config:
  - name: quarot
    r_config_path: maps/llama.json
    r1_matrix_path: /abs/r1.npy
OpTypesToQuantize: [MatMul]
"""
    )
    config = QConfig.load(path)
    assert config.global_config == QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity="Channel"))
    assert config.layer_config_for("/lm_head/MatMul", "MatMul") is None
    assert config.quarot.r_config_path == tmp_path / "maps" / "llama.json"
    assert str(config.quarot.r1_matrix_path) == "/abs/r1.npy"


def test_paths_name_the_same_file_after_a_round_trip(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out" / "quarot.json"
    QuarotConfig(r_config_path="out/near.json", r1_matrix_path="far.npy").to_json("out/quarot.json")
    assert json.loads(path.read_text())["r_config_path"] == "near.json"
    monkeypatch.chdir("/")
    config = QuarotConfig.load(path)
    assert config.r_config_path == tmp_path / "out" / "near.json"
    assert config.r1_matrix_path == tmp_path / "far.npy"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.json", '{"global_config": null,\n "exclude": [}', r"q\.json: line 2, column \d+: "),
        ("q.json", '{"exclude": [], "exclude": []}', "key 'exclude' is given twice"),
        ("q.yaml", "global_config: null\nexclude: [a\nalgo_config: []\n", r"q\.yaml: line \d, column \d+: "),
        ("q.yaml", "exclude: []\nexclude: []\n", "line 2, column 1: key 'exclude' is given twice"),
        ("q.yaml", "", r"global_config: is missing"),
        ("q.yaml", "- 1\n", r"q\.yaml: a mapping is needed, not \[1\]"),
        ("q.json", "[" * 100_000, "nested too deeply"),
        ("q.yaml", "[" * 10_000, "nested too deeply"),
        ("q.json", '{"seed": ' + "9" * 5000 + "}", "thousands of digits"),
        ("q.yaml", "seed: " + "9" * 5000, "thousands of digits"),
        ("q.yaml", "a: \x07\n", "q.yaml: .*not allowed"),
        ("q.toml", "", "suffix '.toml' is not known; use .json, .yaml or .yml"),
        ("q.json", '{"global_confg": null}', r"q\.json: QConfig: unknown key 'global_confg' .did you mean 'global_c"),
        (
            "q.json",
            '{"global_config": {"weight": {"data_type": "Int8", "symetric": true}}}',
            r"q\.json: QConfig\.global_config\.weight: unknown key 'symetric' .did you mean 'symmetric'",
        ),
        (
            "q.yaml",
            "global_config: null\nalgo_config: [{name: quarot, r_matrix_dim: 0}]\n",
            r"q\.yaml: QConfig\.algo_config\[0\]\.r_matrix_dim=0: ",
        ),
    ],
)
def test_faults_name_file_and_place(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        QConfig.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for name in ("q.json", "q.yaml"):
        (tmp_path / name).write_text('\ufeff{"r_matrix_dim": 64}', encoding="utf-8")
        assert QuarotConfig.load(tmp_path / name) == QuarotConfig(r_matrix_dim=64)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        QConfig.load(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ConfigError, match="byte 2 is not UTF-8"):
        QConfig.load(tmp_path / "latin.json")
    with pytest.raises(OutputError, match="cannot be written"):
        FULL.to_yaml(tmp_path / "none" / "q.yaml")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch, error):
    path = tmp_path / "config.json"
    QConfig(QLayerConfig(weight=Int8Spec())).to_json(path)
    before, usual = path.read_bytes(), Path.write_text

    def half(self: Path, text: str, **options: str) -> int:
        usual(self, text[: len(text) // 2], **options)
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    for place in (path, tmp_path / "new.json"):
        with pytest.raises(expected):
            QConfig(QLayerConfig(weight=Int8Spec(symmetric=False))).to_json(place)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_link_is_written_through_and_a_pipe_is_written_to(tmp_path, capfd):
    config, link = QConfig(QLayerConfig(weight=Int8Spec())), tmp_path / "link.json"
    link.symlink_to(tmp_path / "config.json")
    config.to_json(link)
    assert link.is_symlink()
    assert QConfig.from_json(tmp_path / "config.json") == config
    config.to_json("/dev/stdout")
    assert capfd.readouterr().out == (tmp_path / "config.json").read_text()
