from pathlib import Path

import pytest

from quarot_onnx.config import QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.errors import ConfigError


def test_defaults():
    config = QuarotConfig()
    assert config.name == "quarot"
    assert config.r_matrix_dim is None
    assert config.use_random_had is False
    assert config.r_config_path is None
    assert (config.r1, config.r2, config.r3, config.r4) == (None, None, None, None)
    assert (config.seed, config.block_size, config.r1_matrix_path, config.r2_matrix_path) == (0, None, None, None)


def test_a_seed_without_random_hadamards_is_told():
    (note,) = QuarotConfig(seed=3).notes
    assert note.startswith("seed has no effect: ")
    assert "use_random_had" in note
    assert "--random-had" in note
    for config in (QuarotConfig(), QuarotConfig(use_random_had=True, seed=3), QuarotConfig.from_dict({"seed": 0})):
        assert config.notes == ()
    layer = QLayerConfig(UInt8Spec(), UInt8Spec())
    assert QConfig(layer, algo_config=[QuarotConfig(seed=3)]).notes == (note,)


def test_the_name_is_not_among_the_keys_to_choose_from():
    with pytest.raises(ConfigError, match="known keys: r_matrix_dim, "):
        QuarotConfig.from_dict({"nmae": "quarot"})
    assert QuarotConfig.from_dict({"name": "quarot"}) == QuarotConfig()


def test_quarks_empty_path_is_none():
    assert QuarotConfig(r_config_path="").r_config_path is None


def test_paths():
    assert QuarotConfig(r_config_path="a/b.json").r_config_path == Path("a/b.json")
    assert QuarotConfig(r_config_path=Path("a/b.json")) == QuarotConfig(r_config_path="a/b.json")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"r_matrx_dim": 4}, "unknown key 'r_matrx_dim' .did you mean 'r_matrix_dim'"),
        ({"r_matrix_dim": 0}, "r_matrix_dim=0: .*greater than or equal to 1"),
        ({"r_matrix_dim": 4.5}, r"r_matrix_dim=4\.5"),
        ({"r_matrix_dim": True}, "r_matrix_dim=True"),
        ({"use_random_had": "no"}, "use_random_had='no'"),
        ({"seed": -1}, "seed=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"r1": 1}, "r1=1"),
        ({"name": "quorat"}, "name='quorat'"),
        ({"r1": False, "r1_matrix_path": "q.npy"}, "r1=False contradicts r1_matrix_path='q.npy'"),
        ({"r_config_path": 3}, "r_config_path=3"),
    ],
)
def test_wrong_keywords_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^QuarotConfig.*{message}"):
        QuarotConfig(**keywords)
