"""LLMC's two files: what they become, what is ignored with a word, and what is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from quarot_onnx.config import GPTQConfig, OutputFormat, QConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.build import Parts, quantization_config
from quarot_onnx.recipes.loading import Loaded, load
from quarot_onnx.recipes.own import Recipe
from quarot_onnx.recipes.rules import refuse_contradictions
from quarot_onnx.recipes.wording import parse

EVAL = {"eval_pos": ["fake_quant"], "name": "wikitext2", "download": False, "path": "somewhere", "bs": 1}
STEP_1: dict[str, Any] = {
    "base": {"seed": 7},
    "model": {"type": "Llama", "path": "a model", "tokenizer_mode": "slow", "torch_dtype": "auto"},
    "eval": EVAL,
    "quant": {
        "method": "Quarot",
        "weight": {
            "bit": 4,
            "symmetric": False,
            "granularity": "per_channel",
            "group_size": -1,
            "qmax_to_tensor": True,
            "calib_algo": "minmax",
        },
        "act": {"bit": 4, "symmetric": False, "granularity": "per_token", "qmax_to_tensor": True},
        "special": {"rotate_mode": "hadamard", "fp32_had": True, "online_rotate": True},
    },
    "save": {"save_trans": True, "save_fake": False, "save_path": "one"},
}
STEP_2: dict[str, Any] = {
    "base": {"seed": 7},
    "model": {"type": "Llama", "path": "one/transformed_model", "torch_dtype": "auto"},
    "calib": {
        "name": "wikitext2",
        "download": False,
        "path": "text.txt",
        "n_samples": 8,
        "bs": 1,
        "seq_len": 128,
        "preproc": "wikitext2_gptq",
        "seed": 7,
    },
    "eval": EVAL,
    "quant": {
        "method": "GPTQ",
        "weight": {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 32, "calib_algo": "mse"},
        "act": {"bit": 8, "symmetric": True, "granularity": "per_token", "calib_algo": "minmax"},
        "special": {
            "actorder": True,
            "static_groups": True,
            "percdamp": 0.02,
            "blocksize": 64,
            "true_sequential": True,
            "online_rotate": True,
            "fp32_had": True,
        },
        "quant_out": True,
    },
    "save": {"save_trans": False, "save_path": "two"},
}


def changed(step: dict[str, Any], path: str, *, to: object) -> dict[str, Any]:
    """A copy with one key set; ... takes the key out."""
    result = copy.deepcopy(step)
    *sections, last = path.split(".")
    section = result
    for name in sections:
        section = section[name]
    if to is ...:
        del section[last]
    else:
        section[last] = to
    return result


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: dict[str, Any]) -> Path:
        path = tmp_path / "llmc.yml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def recipe_of(loaded: Loaded) -> Recipe:
    recipe = parse(loaded.data, loaded.wording, loaded.folder)
    refuse_contradictions(recipe, loaded.wording)
    return recipe


def config_of(path: Path) -> QConfig:
    loaded = load(path)
    recipe = recipe_of(loaded)
    return quantization_config(recipe, Parts(), recipe.rotation, loaded.wording)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_step_1_is_a_rotation(file: Any) -> None:
    loaded = load(file(STEP_1))
    rotation = recipe_of(loaded).rotation
    assert rotation is not None
    assert (rotation.use_random_had, rotation.seed, rotation.r4, rotation.r3) == (True, 7, True, None)
    assert (loaded.only_rotates, loaded.second_step) == (True, False)
    assert loaded.save_path == Path("one")
    offline = recipe_of(load(file(changed(STEP_1, "quant.special.online_rotate", to=False)))).rotation
    assert offline is not None
    assert offline.r4 is False


def test_quarot_alone_rounds_to_nearest(file: Any) -> None:
    path = file(changed(STEP_1, "save.save_trans", to=False))
    assert not load(path).only_rotates
    config = config_of(path)
    assert config.global_config is not None
    assert config.global_config.activation is not None
    assert config.quarot is not None
    assert config.rounding is not None
    weight, activation = config.global_config.weight, config.global_config.activation
    assert (weight.bits, weight.symmetric, activation.bits, activation.symmetric) == (4, False, 4, False)
    assert (config.rounding.name, config.rounding.mse) == ("rtn", False)
    assert config.resolved_format is OutputFormat.FAKE


def test_step_2_is_gptq(file: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    loaded = load(file(STEP_2))
    assert (loaded.second_step, loaded.online_rotate, loaded.only_rotates) == (True, True, False)
    assert loaded.calibration_notes == ()
    recipe = recipe_of(loaded)
    assert recipe.rotation is None
    assert recipe.calibration.text == tmp_path / "text.txt"
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (8, 128)
    config = config_of(loaded.source)
    assert config.rounding == GPTQConfig(
        perc_damp=0.02, block_size=64, act_order=True, static_groups=True, enable_aq_calibration=True
    )
    assert config.global_config is not None
    assert config.global_config.weight.group_size == 32


def test_what_is_ignored_is_listed(file: Any) -> None:
    notes = load(file(STEP_1)).notes
    assert len(notes) == 1
    ignored = notes[0].split(": ")[-1].split(", ")
    assert ignored == [
        *("model", "eval", "quant.weight.qmax_to_tensor", "quant.act.qmax_to_tensor", "quant.special.fp32_had"),
    ]
    loaded = load(file(STEP_2))
    for key in ("calib.download", "calib.bs", "calib.preproc", "calib.seed"):
        assert key in loaded.notes[0]
    assert "calib.n_samples" not in loaded.notes[0]
    assert "--calib-text" in loaded.calibration_notes[0]
    assert "text.txt" in loaded.calibration_notes[0]


ROUNDS = [
    *("quant.special.actorder", "quant.special.static_groups", "quant.special.percdamp", "quant.special.blocksize"),
    *("quant.special.true_sequential", "quant.quant_out"),
]
ROTATES = ["base.seed", "quant.special.rotate_mode"]


@pytest.mark.parametrize(
    ("method", "ignored", "taken"),
    [("RTN", [*ROTATES, *ROUNDS], []), ("GPTQ", ROTATES, ROUNDS), ("Quarot", ROUNDS, ROTATES)],
)
def test_what_the_method_does_not_take_is_listed(file: Any, method: str, ignored: list[str], taken: list[str]) -> None:
    step = changed(changed(STEP_2, "quant.special.rotate_mode", to="hadamard"), "quant.method", to=method)
    loaded = load(file(step))
    told = loaded.notes[0].split(": ")[-1].split(", ")
    assert set(ignored) <= set(told)
    assert not set(taken) & set(told)
    assert parse(loaded.data, loaded.wording, loaded.folder).weights.method == ("gptq" if method == "GPTQ" else "rtn")
    bare = changed(changed(changed(step, "quant.special", to={}), "base", to={}), "quant.quant_out", to=...)
    assert not set(ROUNDS + ROTATES) & set(load(file(bare)).notes[0].split(": ")[-1].split(", "))


@pytest.mark.parametrize("method", ["RTN", "GPTQ"])
def test_a_rotated_model_to_save_is_none_of_the_second_step(file: Any, method: str) -> None:
    step = changed(STEP_2, "quant.method", to=method)
    assert "save.save_trans" not in load(file(step)).notes[0]
    assert load(file(changed(step, "save.save_trans", to=True))).notes[0].endswith(", save.save_trans")


def test_what_is_ignored_of_a_cache_is_listed(file: Any) -> None:
    cache = {"method": "Naive", "bit": 8, "symmetric": True, "granularity": "per_token", "qmax_to_tensor": True}
    told = load(file(changed(STEP_2, "quant.kvcache", to=cache | {"use_qtorch": False}))).notes[0]
    assert "quant.kvcache.qmax_to_tensor, quant.kvcache.use_qtorch" in told


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("quant.weight.calib_algo", "minmax", ("mse", False)),
        ("quant.quant_out", ..., ("enable_aq_calibration", None)),
        ("quant.act", ..., ("enable_aq_calibration", None)),
        ("quant.method", "RTN", ("name", "rtn")),
        ("quant.method", "gptq", ("name", "gptq")),
    ],
)
def test_settings_of_step_2(file: Any, path: str, value: object, expected: tuple[str, object]) -> None:
    rounding = config_of(file(changed(STEP_2, path, to=value))).rounding
    name, setting = expected
    assert getattr(rounding, name, None) == setting


def test_activations_per_tensor_are_static(file: Any) -> None:
    act = {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}
    plain = {"bit": 8, "symmetric": True, "granularity": "per_tensor"}
    step = changed(changed(STEP_2, "quant.act", to=act), "quant.weight", to=plain)
    layer = config_of(file(step)).global_config
    assert layer is not None
    assert layer.activation is not None
    assert layer.activation.quant_granularity.name == layer.weight.quant_granularity.name == "Tensor"


def test_fake_where_it_is_saved(file: Any) -> None:
    step = changed(changed(STEP_2, "quant.weight.granularity", to="per_channel"), "quant.weight.group_size", to=-1)
    assert config_of(file(step)).resolved_format is OutputFormat.W4A8
    assert config_of(file(changed(step, "save.save_fake", to=True))).output_format is OutputFormat.FAKE


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("quant.weight.bits", 4, "'bits' (did you mean 'bit'?)"),
        ("quant.special.act_order", True, "'act_order' (did you mean 'actorder'?)"),
        ("calib.nsamples", 4, "'nsamples' (did you mean 'n_samples'?)"),
        ("save.save_pth", "x", "'save_pth' (did you mean 'save_path'?)"),
        ("quantt", {}, "'quantt' (did you mean 'quant'?)"),
        ("quant.method", "Awq", "use Quarot, GPTQ, RTN"),
        ("quant.weight.bit", 9, "quant.weight.bit: 9: weights have 2 to 8 bits, or 16"),
        ("quant.act.bit", 1, "quant.act.bit: 1: activations have 2 to 8 bits"),
        ("quant.special.percdamp", 0, "quant.special.percdamp: 0.0: "),
        ("quant.special.true_sequential", False, "true_sequential: false is not supported"),
        ("quant.special.owq", True, "owq: true is not supported"),
        ("quant.special.rotate_mode", "random", "rotate_mode: random is not supported; use hadamard"),
        ("quant.quant_out", False, "quant.quant_out: false is not supported"),
        ("quant.weight.granularity", "per_channel", "quant.weight.granularity: per_channel contradicts group_size: 32"),
        ("quant.weight.group_size", -1, "quant.weight.granularity: per_group contradicts group_size: -1"),
        ("quant.weight.granularity", "per_head", "'per_head'"),
        ("quant.weight.calib_algo", "learnable", "'learnable'"),
        ("quant.act.granularity", "per_tensor", "static: false is not supported"),
        ("quant.special.static_groups", False, "quant.special.actorder: with groups of 32 it needs static groups"),
        ("save.save_vllm", True, "save_vllm: true is not supported"),
        ("quant.weight", ..., "is missing"),
        ("quant.weight", None, "quant.weight=None: the section is empty; give its keys"),
        ("quant.special.percdamp", "0.01", "a number without quotes is wanted; write 0.01"),
        ("quant.special.percdamp", "1e-2", "write 0.01 (YAML takes 1e-2 for text and 1.0e-2 for a number)"),
        ("quant.special.percdamp", True, "percdamp=True: "),
        ("quant.special.blocksize", 64.0, "a whole number is wanted; write 64"),
        ("calib.n_samples", "4", "a whole number without quotes is wanted; write 4"),
        ("calib.seq_len", True, "seq_len=True: "),
        ("base.seed", True, "seed=True: "),
    ],
)
def test_refusals(file: Any, path: str, value: object, named: str) -> None:
    assert named in refusal(file(changed(STEP_2, path, to=value)))
